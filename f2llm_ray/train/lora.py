"""LoRA (Hu et al. 2021, arXiv 2106.09685): a pair of small matrices beside each linear weight, which stays.

A weight W [out, in] works as W + scale * B A, with A [rank, in] random and B [out, rank] 0 at the start. The
package PEFT puts the pairs into the backbone in place, so that all else finds its modules where they were. A map
after pooling (`model.dense`), which is small, is trained whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.optional import require
from f2llm_ray.model.dense import dense_of
from f2llm_ray.model.families import Family, Weight, family_of
from f2llm_ray.model.sizes import Shape, family_of_shape, shape_axes
from f2llm_ray.train.settings import ALL_LINEAR, Lora

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ADAPTER = "adapter"
"""Folder of the adapters in that of the stage which made them, beside its model's."""
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""PEFT's names."""
PAIR = ("lora_A", "lora_B")
"""PEFT's names of A and B, in the module of the weight that they change."""
OWN = "default"
"""PEFT's name of the only pair of a module."""


def adapted(lora: Lora, family: Family, layers: int, place: str, model: str = "the model") -> dict[str, Weight]:
    """The weights that get a pair, by the names of their modules in the backbone, in its order.

    Args:
        lora: names the targets.
        family: of the backbone.
        layers: how many it has.
        place: what errors start with.
        model: what they call the model.

    Raises:
        RunError: a target is the end of no linear module's name.
    """
    linear = {
        f"{family.layers}.{layer}.{name}": weight
        for layer in range(layers)
        for name, weight in family.linear.items()
    }
    if lora.targets == ALL_LINEAR:
        return linear
    for target in lora.targets:
        if not any(_ends(name, target) for name in linear):
            raise RunError(
                f"{place}: lora.targets: found {target!r}, expected what the name of a linear module of {model} "
                f"ends in; those of its layers are {', '.join(family.linear)}"
            )
    return {name: weight for name, weight in linear.items() if any(_ends(name, end) for end in lora.targets)}


def _ends(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def adapter_parameters(lora: Lora, shape: Shape, place: str) -> int:
    """Parameters of all pairs of a model of this shape.

    Raises:
        RunError: as `adapted`.
    """
    axes = shape_axes(shape)
    pairs = adapted(lora, family_of_shape(shape), shape.layers, place).values()
    return lora.rank * sum(axes[axis] for weight in pairs for axis in weight.axes)


def add_adapters(backbone: PreTrainedModel, lora: Lora, seed: int, place: str) -> None:
    """Puts a pair beside each targeted weight; only these, and a map after pooling, are trained from here on.

    Args:
        backbone: is changed in place: the weight of module M is then at `M.base_layer`.
        lora: rank, scale and targets.
        seed: what A is drawn from.
        place: what errors start with.

    Raises:
        DataError: PEFT is not installed.
        RunError: a target is the end of no linear module's name.
    """
    import torch

    peft = require("peft", extra="lora")
    names = list(adapted(lora, family_of(backbone.config), backbone.config.num_hidden_layers, place))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(_config(peft, lora, names), backbone, OWN)
    dense = dense_of(backbone)
    if dense is not None:
        dense.requires_grad_(True)


def _config(peft: Any, lora: Lora, names: list[str]) -> Any:
    alpha = lora.scaled_by
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # other readers of the file expect a whole number
        target_modules=names,
        task_type="FEATURE_EXTRACTION",
    )


def changed(
    name: str, left: torch.Tensor, lora: Lora | None, find: Callable[[str], torch.Tensor | None]
) -> torch.Tensor:
    """A weight of the backbone as training has made it.

    Args:
        name: its name in the backbone.
        left: its value before training.
        lora: that of the stage; None where weights are trained whole.
        find: returns a trained parameter by its name in the backbone; None where there is none.
    """
    whole = find(name)
    if whole is not None:
        return whole
    module = name.removesuffix(".weight")
    a, b = (None if lora is None else find(f"{module}.{part}.{OWN}.weight") for part in PAIR)
    return left if lora is None or a is None or b is None else left + lora.scale * (b @ a)


def write_adapter(folder: Path, lora: Lora, trained: Mapping[str, torch.Tensor]) -> None:
    """Writes the pairs as PEFT has them, for `PeftModel.from_pretrained` over the model that training began from.

    Args:
        folder: gets the two files, and is there.
        lora: rank and scale.
        trained: the trained parameters, by their names in the backbone.
    """
    from safetensors.torch import save_file

    ends = tuple(f".{part}.{OWN}.weight" for part in PAIR)
    pairs = {name: value for name, value in trained.items() if name.endswith(ends)}
    named = {
        f"base_model.model.{name.replace(f'.{OWN}.', '.')}": value.contiguous() for name, value in pairs.items()
    }
    save_file(named, folder / ADAPTER_FILE, metadata={"format": "pt"})
    modules = [name.removesuffix(ends[0]) for name in sorted(pairs) if name.endswith(ends[0])]
    config = _config(require("peft", extra="lora"), lora, modules)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    path = folder / ADAPTER_CONFIG
    # PEFT keeps the names as a set, whose order differs from process to process.
    said = {**json.loads(path.read_text(encoding="utf-8")), "target_modules": modules}
    path.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
