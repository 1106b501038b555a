"""The stage of a model with int8 weights: made from its parent, and measured beside it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.progress import say
from f2llm_ray.data.drawn import calibration_tokens
from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine.engine import Engine
from f2llm_ray.model.checkpoint import INFO_FILE, load_backbone, load_info
from f2llm_ray.model.dims import Vectors
from f2llm_ray.model.int8 import WEIGHTS_FILE, is_quantized, quantize
from f2llm_ray.model.vocabulary import MAP_FILE, load_map, remap
from f2llm_ray.run.folder import Folder

ROWS, ROUNDS = 256, 3
"""Training rows whose texts are encoded by both models, and how often, in turn; the facts give medians."""


def quantize_model(
    sources: Sequence[str],
    seed: int,
    *,
    embeddings: bool,
    model_name: str,
    prepared: Folder,
    parent: Folder,
    out: Folder,
) -> dict[str, Any]:
    """Makes the int8 copy of the parent, a model folder with float weights, inside a Ray task.

    The sources give the texts which both models encode. The stage's folder `out` gets `model/`.

    Returns:
        Facts for the manifest: bytes of the weights, the cosine of both models' vectors (mean and least), and
        texts per second of each on one thread. The evaluations of both show what it costs in quality.
    """
    torch.set_num_threads(1)
    with parent.as_local() as before, (out / "model").writing() as after:
        save_quantized(before, after, embeddings=embeddings)
        made = Folder.at(str(after))
        made.write_json(INFO_FILE, {**made.read_json(INFO_FILE), "name": model_name})
        tokens = remap(calibration_tokens(sources, seed, prepared, ROWS), load_map(parent))
        facts = {
            "bytes_of_weights": {"float": _weights(before), "int8": _weights(after)},
            **compare(before, after, tokens),
        }
    say(f"{model_name}: cosine {facts['cosine']['mean']:.4f} to the model it is made from")
    return {"quantization": facts}


def save_quantized(parent: Path, folder: Path, *, embeddings: bool = True) -> None:
    """Writes the model folder of a parent's int8 copy: config, tokenizer and facts are the parent's.

    Raises:
        RunError: the parent is no model folder of ours, or has int8 weights already.
    """
    from safetensors.torch import save_file

    load_info(parent)
    if is_quantized(parent):
        raise RunError(f"{parent}: its weights are int8 already")
    state = quantize(load_backbone(parent), embeddings=embeddings).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / WEIGHTS_FILE)
    for name in ("config.json", INFO_FILE, "tokenizer.json", "tokenizer_config.json", MAP_FILE):
        if (parent / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(parent / name, folder / name)


def compare(before: Path, after: Path, tokens: Sequence[Tokens]) -> dict[str, Any]:
    """Cosine (mean and least) of two models' vectors of some texts, and texts per second of each."""
    engines = {"float": Engine(before), "int8": Engine(after)}
    seconds: dict[str, list[float]] = {key: [] for key in engines}
    vectors: dict[str, Vectors] = {}
    for _ in range(ROUNDS):
        for key, engine in engines.items():
            started = time.perf_counter()
            vectors[key] = engine.embed_tokens(tokens)
            seconds[key].append(time.perf_counter() - started)
    cosine_n = np.sum(vectors["float"] * vectors["int8"], axis=1)
    return {
        "cosine": {"mean": round(float(cosine_n.mean()), 5), "least": round(float(cosine_n.min()), 5)},
        "texts_per_second": {
            key: round(len(tokens) / float(np.median(spent)), 1) for key, spent in seconds.items()
        },
    }


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
