"""What other loaders need in a model folder beyond what transformers 5 writes: the same facts, said their way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOCAL_BASES = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
}
"""What transformers 4 calls the rotary bases of layers that see all and of those that slide, by model type."""


def mend_config(path: Path, dims: Sequence[int], end: int | None) -> None:
    """Adds to a config.json what other loaders look for.

    - the rotary base where transformers 4 reads it: without it sentence-transformers 5 gives wrong vectors and no
      word (cosine 0.53), since it takes a default;
    - the matryoshka dims by the names that vLLM reads, without which it refuses `dimensions`;
    - the token that ends a text, by which llama.cpp and vLLM know it.

    Args:
        path: the file.
        dims: the dims the model was trained for.
        end: the id of the token that ends a decoder's text; None for an encoder, whose config says its own.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= _rotary(config)
    for name in ("is_matryoshka", "matryoshka_dimensions"):
        config.pop(name, None)  # of the model that this one is made from
    if len(dims) > 1:
        config |= {"is_matryoshka": True, "matryoshka_dimensions": list(dims)}
    if end is not None:
        config["eos_token_id"] = end
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary base as transformers 4 names it; nothing for a model without."""
    said = config.get("rope_parameters") or {}
    if "rope_theta" in said:
        scaling = {name: value for name, value in said.items() if name != "rope_theta"}
        scaled = {} if said.get("rope_type", "default") == "default" else {"rope_scaling": scaling}
        return {"rope_theta": said["rope_theta"], **scaled}
    names = LOCAL_BASES.get(config.get("model_type", ""))
    if names is None or not said:
        return {}
    kinds = ("full_attention", "sliding_attention")
    return {name: said[kind]["rope_theta"] for name, kind in zip(names, kinds, strict=True) if kind in said}
