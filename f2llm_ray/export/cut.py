"""A model folder cut to fewer layers, fewer dims, or both, as it was trained to be: a stock folder of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from f2llm_ray import __version__
from f2llm_ray.base.errors import RunError
from f2llm_ray.export.export import building, refuse_used
from f2llm_ray.model.checkpoint import OWN, ModelInfo, fingerprint, has_dense, load_info
from f2llm_ray.model.described import CONFIG_FILE
from f2llm_ray.report.model_card import CARD, model_card, read_card
from f2llm_ray.run.folder import Folder

FACTS_FILE = f"{OWN}/cut.json"


def cut(model: Path, out: Path, *, layers: int | None = None, dims: int | None = None) -> dict[str, Any]:
    """Writes the first layers of a local model folder, with vectors of its first dims.

    Args:
        model: a model folder.
        out: the new folder; not there yet, or empty.
        layers: how many, one of its exits; all when unset.
        dims: the size of the vectors, one of its matryoshka dims; as it is when unset.

    Returns:
        What `f2llm/cut.json` holds: the parent's name and fingerprint, layers and dims of both, parameters.

    Raises:
        RunError: the model was not trained to be cut so, has int8 weights or is damaged, or `out` is in use.
    """
    from f2llm_ray.data.tokens.tokenizer import load_tokenizer
    from f2llm_ray.engine.engine import Engine
    from f2llm_ray.engine.text_engine import CHECK_TEXTS, Calibration, load_calibration, save_calibration
    from f2llm_ray.model.checkpoint import load_backbone, save_model
    from f2llm_ray.model.dense import keep_dims, vector_dims
    from f2llm_ray.model.prune import first_layers
    from f2llm_ray.model.sizes import count_parameters
    from f2llm_ray.model.vocabulary import load_map, save_map

    info, has = admit(model, out, layers=layers, dims=dims)
    layers, dims = layers or has, dims or info.dims[-1]
    backbone = load_backbone(model).eval()
    small = first_layers(backbone, layers)
    if dims < vector_dims(small):
        keep_dims(small, dims)
    shorter = {f"-{layers}-layers": layers < has, f"-{dims}-dims": dims < info.dims[-1]}
    named = replace(
        info,
        name=info.name + "".join(end for end, is_so in shorter.items() if is_so),
        dims=tuple(dim for dim in info.dims if dim <= dims),
        exits=tuple(number for number in info.exits if number < layers),
    )
    total, inside = count_parameters(small)
    facts = {
        "parent": info.name,
        "parent_fingerprint": fingerprint(Folder.at(str(model))),
        "layers": layers,
        "of_layers": has,
        "dims": dims,
        "of_dims": info.dims[-1],
        "parameters": total,
        "non_embedding_parameters": inside,
        "made_by": f"f2llm_ray {__version__}",
    }
    before = load_calibration(model)
    with building(out) as path:
        save_model(path, small, load_tokenizer(model), named)
        token_map = load_map(Folder.at(str(model)))
        if token_map is not None:
            save_map(token_map, path)
        # Ranges for int8 are measured on training text: those of other layers are not known here.
        known = {} if before is None or layers < has else before.ranges
        ranges = {dim: known[dim] for dim in named.dims if dim in known}
        folder = Folder.at(str(path))
        save_calibration(folder, Calibration(ranges, Engine(path).embed(CHECK_TEXTS)))
        (folder / OWN).write_json(Path(FACTS_FILE).name, facts)
        folder.write_bytes(CARD, _card(model, named, facts).encode("utf-8"))
    return facts


def admit(model: Path, out: Path, *, layers: int | None, dims: int | None) -> tuple[ModelInfo, int]:
    """Checks what can be checked before any work; returns the model's facts, and how many layers it has.

    Raises:
        RunError: as `cut`.
    """
    from f2llm_ray.model.int8 import is_quantized

    info = load_info(model)
    has = int(Folder.at(str(model)).read_json(CONFIG_FILE)["num_hidden_layers"])
    if is_quantized(model):
        raise RunError(f"{model}: its weights are int8; cut the model that it was made from")
    if layers is not None and layers not in (*info.exits, has):
        exits = f"one of {list(info.exits)}" if info.exits else f"all {has}: it has no exits"
        raise RunError(
            f"{model}: layers: found {layers}, expected {exits}. Vectors after another layer say little: "
            "train with elastic.layers, or prune it in a recipe (prune.layers) and train it again"
        )
    if dims is not None and dims not in info.dims:
        raise RunError(f"{model}: dims: found {dims}, expected one of {list(info.dims)}, which it was trained for")
    refuse_used(out)
    return info, has


def _card(model: Path, named: ModelInfo, facts: dict[str, Any]) -> str:
    """The card of the new folder: languages and backbone are those of the parent's card, scores are not."""
    data = read_card(model / CARD).data.to_dict() if (model / CARD).is_file() else {}
    said = data.get("language") or []
    languages = [said] if isinstance(said, str) else list(said)
    code = ["code:any"] if "code" in (data.get("tags") or []) else []
    report = {"languages": dict.fromkeys([*languages, *code], 0), "backbone": data.get("base_model")}
    entry = {
        "name": named.name,
        "cut": facts,
        **{key: facts[key] for key in ("parameters", "non_embedding_parameters")},
    }
    return model_card(report, entry, named, mapped=has_dense(Folder.at(str(model))))
