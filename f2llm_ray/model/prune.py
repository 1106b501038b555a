"""Pruning: a smaller model of the same architecture from the parts that matter most.

Kept channels and layers stay in their order. The result computes what the parent would with the removed parts
masked to zero, so its config is stock and `AutoModel` loads it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from f2llm_ray.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from f2llm_ray.model.importance import Importance


@dataclass(frozen=True)
class Kept:
    """Which parts stay, by their numbers in the parent, ascending."""

    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    ffn: tuple[tuple[int, ...], ...]
    """For each kept layer, its FFN channels."""


def choose(importance: Importance, *, layers: int, hidden: int, ffn: int) -> Kept:
    """The most important parts, the given number of each.

    Raises:
        RecipeError: more of something is wanted than the parent has.
    """
    has = {
        "layers": (layers, len(importance.layers_l)),
        "hidden": (hidden, len(importance.hidden_d)),
        "ffn": (ffn, importance.ffn_lf.shape[1]),
    }
    for name, (wanted, there) in has.items():
        if wanted > there:
            raise RecipeError(f"prune.{name}: {wanted} wanted, but the parent has {there}")
    kept_layers = _top(importance.layers_l, layers)
    return Kept(
        layers=kept_layers,
        hidden=_top(importance.hidden_d, hidden),
        ffn=tuple(_top(importance.ffn_lf[layer], ffn) for layer in kept_layers),
    )


@torch.no_grad()
def prune(backbone: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """The pruned copy of a Qwen3-like decoder; the parent is left as it is.

    RMSNorm divides by the root mean square over the channels. Over the d' that stay, the mean of their squares is
    larger by d / d' than the parent's with zeros in place of the others, so norm weights are scaled by
    sqrt(d / d'); keeping all returns the parent's weights bit for bit.
    """
    parent = backbone.config
    config = copy.deepcopy(parent)
    config.num_hidden_layers = len(kept.layers)
    config.hidden_size = len(kept.hidden)
    config.intermediate_size = len(kept.ffn[0])
    if getattr(parent, "layer_types", None) is not None:
        config.layer_types = [parent.layer_types[layer] for layer in kept.layers]
    small = type(backbone)(config).to(backbone.dtype).eval()
    hidden = torch.tensor(kept.hidden)
    scale = math.sqrt(parent.hidden_size / config.hidden_size)
    old, new = backbone.state_dict(), small.state_dict()
    layer_of = {f"layers.{number}.": f"layers.{layer}." for number, layer in enumerate(kept.layers)}
    for name, target in new.items():
        prefix = next((p for p in layer_of if name.startswith(p)), "")
        value = old[layer_of.get(prefix, "") + name.removeprefix(prefix)]
        ffn = torch.tensor(kept.ffn[int(prefix.split(".")[1])]) if prefix else None
        target.copy_(_slice(name, value, hidden, ffn, scale))
    return small


def _slice(
    name: str, value: torch.Tensor, hidden: torch.Tensor, ffn: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The kept part of one weight; linear weights are [out, in]."""
    if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")) or name == "norm.weight":
        return value[hidden] * scale
    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) or name == "embed_tokens.weight":
        return value[:, hidden]
    if name.endswith("o_proj.weight"):
        return value[hidden]
    if name.endswith(("gate_proj.weight", "up_proj.weight")):
        return value[ffn][:, hidden]
    if name.endswith("down_proj.weight"):
        return value[hidden][:, ffn]
    return value  # q_norm, k_norm and attention biases work on heads, which all stay


def _top(scores: torch.Tensor, count: int) -> tuple[int, ...]:
    """Numbers of the largest scores, ascending; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)[:count]
    return tuple(sorted(order.tolist()))
