"""Pruning: a smaller model of the same architecture from the parts that matter most.

Kept parts stay in their order. The result computes what the parent would with the removed parts masked to zero
(`model/families.py` says how that survives a smaller hidden size); its config is stock and `AutoModel` loads it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.model.dense import dense_of, put_dense
from f2llm_ray.model.families import Axis, Family, Part, axis_sizes, check_cut, family_of, kv_heads

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from f2llm_ray.model.settings import Keep


@dataclass(frozen=True)
class Importance:
    """Scores of a model's parts; larger matters more. FFN channels and heads are compared within their layer."""

    hidden_d: torch.Tensor
    ffn_lf: torch.Tensor
    kv_heads_lg: torch.Tensor
    layers_l: torch.Tensor


@dataclass(frozen=True)
class Kept:
    """Which parts stay, by their numbers in the parent, ascending."""

    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    """Channels of the residual stream, the same in all layers."""
    ffn: tuple[tuple[int, ...], ...]
    """For each kept layer, its FFN channels."""
    kv_heads: tuple[tuple[int, ...], ...]
    """For each kept layer, its key-value heads; their query heads stay with them."""
    vocabulary: tuple[int, ...] | None = None
    """Tokens; all when None."""


def choose(importance: Importance, wanted: Keep, *, first_layer_stays: bool = False, place: str = "prune") -> Kept:
    """The most important parts, as many of each as wanted; all where it says nothing, and all tokens.

    Args:
        importance: the scores of the parent's parts.
        wanted: how many of each stay.
        first_layer_stays: keep the first layer whatever its score (`Family.first_layer_stays`).
        place: where the recipe says what is wanted, for errors.

    Raises:
        RecipeError: more of something is wanted than the parent has.
    """
    has: dict[Part, int] = {
        "layers": len(importance.layers_l),
        "hidden": len(importance.hidden_d),
        "ffn": importance.ffn_lf.shape[1],
        "kv_heads": importance.kv_heads_lg.shape[1],
    }
    count: dict[Part, int] = {}
    for name, there in has.items():
        asked = wanted.count(name)
        count[name] = there if asked is None else asked
        if count[name] > there:
            raise RecipeError(f"{place}.{name}: {count[name]} wanted, but the parent has {there}")
    layers_l = importance.layers_l.clone()
    if first_layer_stays:
        layers_l[0] = math.inf
    layers = wanted.layers if isinstance(wanted.layers, tuple) else _top(layers_l, count["layers"])
    if layers[-1] >= has["layers"] or (first_layer_stays and layers[0]):
        expected = f"numbers from 0 to {has['layers'] - 1}{', 0 among them' if first_layer_stays else ''}"
        raise RecipeError(f"{place}.layers: found {list(layers)}, expected {expected}")
    return Kept(
        layers=layers,
        hidden=_top(importance.hidden_d, count["hidden"]),
        ffn=tuple(_top(importance.ffn_lf[layer], count["ffn"]) for layer in layers),
        kv_heads=tuple(_top(importance.kv_heads_lg[layer], count["kv_heads"]) for layer in layers),
    )


@torch.no_grad()
def prune(backbone: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """The pruned copy of a backbone; the parent is left as it is, and keeping all returns its weights bit for bit.

    Raises:
        RunError: the model is of a family that cannot lose such a part.
        RecipeError: the family has no model of this shape.
    """
    parent = backbone.config
    family = family_of(parent)
    check_cut(parent, _parts_cut(parent, kept))
    small: PreTrainedModel = type(backbone)(_config(parent, kept), **family.options).to(backbone.dtype).eval()
    scale = math.sqrt(len(kept.hidden) / parent.hidden_size)
    old = backbone.state_dict()
    for name, target in small.state_dict().items():
        layer = family.layer_of(name)
        source = name
        if layer is not None:
            source = name.replace(f"{family.layers}.{layer}.", f"{family.layers}.{kept.layers[layer]}.", 1)
        target.copy_(_cut(old[source], name, family, _places(parent, kept, layer), scale))
    dense = dense_of(backbone)
    if dense is not None:  # the last norm gives the channels that stay as the parent's would be with the others 0
        put_dense(small, _fewer_inputs(dense, kept.hidden))
    return small


def _fewer_inputs(dense: torch.nn.Module, kept: tuple[int, ...]) -> torch.nn.Linear:
    """The map after pooling from the channels that stay, to as many dims."""
    weight, bias = dense.get_parameter("weight"), getattr(dense, "bias", None)
    linear = torch.nn.Linear(
        len(kept), len(weight), bias=bias is not None, dtype=weight.dtype, device=weight.device
    )
    linear.weight.copy_(weight[:, torch.tensor(kept, device=weight.device)])
    if bias is not None:
        linear.bias.copy_(bias)
    return linear


def first_layers(backbone: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A copy of the first layers of a backbone, with all else of it, the norm after the last layer too.

    Its vectors are those of the exit after so many layers (`engine.encode`).

    Raises:
        RecipeError: it has no so many.
    """
    config = backbone.config
    if not 1 <= layers <= config.num_hidden_layers:
        raise RecipeError(f"layers: found {layers}, expected 1 to {config.num_hidden_layers}, which the model has")
    kept = Kept(
        layers=tuple(range(layers)),
        hidden=tuple(range(config.hidden_size)),
        ffn=(tuple(range(config.intermediate_size)),) * layers,
        kv_heads=(tuple(range(kv_heads(config))),) * layers,
    )
    return prune(backbone, kept)


def _parts_cut(parent: PreTrainedConfig, kept: Kept) -> list[Part]:
    cut: dict[Part, bool] = {
        "layers": len(kept.layers) < parent.num_hidden_layers,
        "hidden": len(kept.hidden) < parent.hidden_size,
        "ffn": len(kept.ffn[0]) < parent.intermediate_size,
        "kv_heads": len(kept.kv_heads[0]) < kv_heads(parent),
        "vocabulary": kept.vocabulary is not None,
    }
    return [part for part, some in cut.items() if some]


def _config(parent: PreTrainedConfig, kept: Kept) -> PreTrainedConfig:
    from huggingface_hub.errors import StrictDataclassError

    config = copy.deepcopy(parent)
    sizes = axis_sizes(parent)
    config.num_hidden_layers = len(kept.layers)
    config.hidden_size = len(kept.hidden)
    config.intermediate_size = len(kept.ffn[0])
    if hasattr(parent, "num_key_value_heads"):
        config.head_dim = sizes["head_dim"]
        config.num_key_value_heads = len(kept.kv_heads[0])
        config.num_attention_heads = len(kept.kv_heads[0]) * sizes["heads"] // sizes["kv_heads"]
    if kept.vocabulary is not None:
        config.vocab_size = len(kept.vocabulary)
        new = {old: number for number, old in enumerate(kept.vocabulary)}
        encoder_only = [name for name in ("cls_token_id", "sep_token_id") if hasattr(parent, name)]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", *encoder_only):
            setattr(config, name, _renumbered(getattr(parent, name, None), new))
        family = family_of(parent)
        if family.first_position(config) != family.first_position(parent):
            raise RecipeError(
                "prune.vocabulary: the padding token's number would change, from which "
                f"{parent.model_type} counts positions; its tokenizer must have it before all tokens that can go"
            )
    if getattr(parent, "layer_types", None) is not None:
        config.layer_types = [parent.layer_types[layer] for layer in kept.layers]
    try:
        config.validate()
    except StrictDataclassError as error:
        raise RecipeError(f"prune: no {parent.model_type} has this shape: {error.__cause__}") from None
    return config


def _renumbered(token: int | list[int] | None, new: dict[int, int]) -> int | list[int] | None:
    """A special token of a config by its new number; none where it was dropped."""
    if isinstance(token, list):
        return [new[one] for one in token if one in new] or None
    return None if token is None else new.get(token)


def _places(parent: PreTrainedConfig, kept: Kept, layer: int | None) -> dict[Axis, torch.Tensor]:
    """What stays along each axis that is cut; those of a layer's inside only in a layer."""
    places: dict[Axis, torch.Tensor] = {"hidden": torch.tensor(kept.hidden)}
    if kept.vocabulary is not None:
        places["vocabulary"] = torch.tensor(kept.vocabulary)
    if layer is not None:
        sizes = axis_sizes(parent)
        heads_per_group = sizes["heads"] // sizes["kv_heads"]
        groups = torch.tensor(kept.kv_heads[layer])
        ffn = torch.tensor(kept.ffn[layer])
        places["ffn"] = ffn
        places["ffn_pair"] = torch.cat([ffn, ffn + sizes["ffn"]])
        places["kv_heads"] = _spans(groups, sizes["head_dim"])
        places["heads"] = _spans(groups, sizes["head_dim"] * heads_per_group)
    return places


def _spans(blocks: torch.Tensor, width: int) -> torch.Tensor:
    """The numbers within blocks of this width."""
    return (blocks[:, None] * width + torch.arange(width)).flatten()


def _cut(
    value: torch.Tensor, name: str, family: Family, places: dict[Axis, torch.Tensor], scale: float
) -> torch.Tensor:
    """The kept part of one weight, of the size that fits the hidden size."""
    weight = family.weight(name)
    for dimension, axis in enumerate(weight.axes):
        if axis in places and len(places[axis]) < value.shape[dimension]:
            value = value.index_select(dimension, places[axis].to(value.device))
    if scale == 1 or not weight.power:
        return value
    shift = 1.0 if family.norm_adds_one and weight.power == -1 else 0.0
    return (value.double() + shift) * scale**weight.power - shift


def _top(scores: torch.Tensor, count: int) -> tuple[int, ...]:
    """Numbers of the largest scores, ascending; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)[:count]
    return tuple(sorted(order.tolist()))
