"""Importance: which parts of a model move its embeddings, measured on calibration text.

Shapes: n texts, t tokens of a pass, l layers, r norms that read the residual stream, d hidden channels, f FFN
channels, g key-value heads (each with the query heads that share it), e channels of a group's heads together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from f2llm_ray.model.encoder import Tokens, encode_pass, plan
from f2llm_ray.model.families import axis_sizes, family_of
from f2llm_ray.model.varlen import packs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Importance:
    """Scores of a model's parts; larger matters more. FFN channels and heads are compared within their layer."""

    hidden_d: torch.Tensor
    ffn_lf: torch.Tensor
    kv_heads_lg: torch.Tensor
    layers_l: torch.Tensor


@dataclass(frozen=True)
class Sums:
    """What a part of the calibration text adds to the scores, in float64; parts are added in any split."""

    hidden_rd: torch.Tensor
    """Absolute activations of each channel after each norm that reads the residual stream (as in Minitron)."""
    ffn_lf: torch.Tensor
    """Length of what each FFN channel writes to the residual stream."""
    kv_heads_lg: torch.Tensor
    """Length of what the heads of each group write together."""
    layers_l: torch.Tensor
    """How far the embeddings turn when the layer is skipped: 1 - cosine."""
    tokens: int
    texts: int

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def importance(self) -> Importance:
        """The means over tokens, and over texts for layers; all norms weigh the same."""
        hidden_rd = self.hidden_rd / self.hidden_rd.mean(1, keepdim=True)
        return Importance(
            hidden_rd.mean(0),
            self.ffn_lf / self.tokens,
            self.kv_heads_lg / self.tokens,
            self.layers_l / self.texts,
        )


@torch.no_grad()
def measure(backbone: PreTrainedModel, tokens: Sequence[Tokens], *, tokens_per_pass: int) -> Sums:
    """Runs calibration texts through a model and sums what its parts do. Padding does not count.

    A layer's skip runs only the layers after it, from the inputs that the whole pass left: L/2 passes for L layers.

    Args:
        backbone: the model, in evaluation mode.
        tokens: calibration texts as token lists, at least one.
        tokens_per_pass: token budget of one forward pass; the inputs of all layers are held for it.

    Raises:
        RunError: the model is of a family that cannot be pruned.
    """
    passes = plan(backbone, tokens, tokens_per_pass)
    found = [_measure_pass(backbone, [tokens[index] for index in indices]) for indices in passes]
    total = found[0]
    for more in found[1:]:
        total = total + more
    return total


def _measure_pass(backbone: PreTrainedModel, tokens: Sequence[Tokens]) -> Sums:
    layers, family = backbone.layers, family_of(backbone.config)
    groups = backbone.config.num_key_value_heads
    lengths = torch.tensor([len(text) for text in tokens], device=backbone.device)
    padded = not packs(backbone)
    longest = int(lengths.max())
    # Of all places of the pass, padding included: those of real tokens, and those of each text's last.
    real_T = torch.ones(int(lengths.sum()), dtype=torch.bool, device=lengths.device)
    ends_n = lengths.cumsum(0) - 1
    if padded:
        real_T = (torch.arange(longest, device=lengths.device) < lengths[:, None]).flatten()
        ends_n = torch.arange(len(lengths), device=lengths.device) * longest + lengths - 1

    readers = [layer.get_submodule(name) for layer in layers for name in family.readers]
    hidden: list[torch.Tensor] = []
    ffn: list[torch.Tensor] = []
    kv_heads: list[torch.Tensor] = []
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def watch_hidden(x_ntd: torch.Tensor) -> None:
        hidden.append(_sum(x_ntd.flatten(0, -2)[real_T].abs()))

    def watch_ffn(x_ntf: torch.Tensor, weight_df: torch.Tensor) -> None:
        ffn.append(_sum(x_ntf.flatten(0, -2)[real_T].abs()) * weight_df.double().norm(dim=0))

    def watch_heads(x_nth: torch.Tensor, weight_dh: torch.Tensor) -> None:
        kv_heads.append(_sum(written_by_groups(x_nth.flatten(0, -2)[real_T], weight_dh, groups)))

    def watch_call(_layer: torch.nn.Module, args: tuple[torch.Tensor], keywords: dict[str, Any]) -> None:
        calls.append((args[0], keywords))

    def seen(see: Callable[[torch.Tensor, torch.Tensor], None]) -> Callable[[Any, Any, Any], None]:
        return lambda linear, inputs, _output: see(inputs[0], linear.weight)

    with ExitStack() as hooks:
        for norm in [*readers, backbone.norm]:
            hooks.callback(norm.register_forward_hook(lambda _norm, _inputs, output: watch_hidden(output)).remove)
        for layer in layers:
            hooks.callback(layer.mlp.down_proj.register_forward_hook(seen(watch_ffn)).remove)
            hooks.callback(layer.self_attn.o_proj.register_forward_hook(seen(watch_heads)).remove)
            hooks.callback(layer.register_forward_pre_hook(watch_call, with_kwargs=True).remove)
        whole_nd = encode_pass(backbone, tokens)
    moved = []
    for skipped in range(len(layers)):
        x_ntd = calls[skipped][0]
        for layer, (_, keywords) in zip(layers[skipped + 1 :], calls[skipped + 1 :], strict=True):
            x_ntd = layer(x_ntd, **keywords)
        without_nd = backbone.norm(x_ntd).flatten(0, -2)[ends_n]
        moved.append((1 - cosine_similarity(whole_nd.double(), without_nd.double(), dim=-1)).sum())
    return Sums(
        hidden_rd=torch.stack(hidden).cpu(),
        ffn_lf=torch.stack(ffn).cpu(),
        kv_heads_lg=torch.stack(kv_heads).cpu(),
        layers_l=torch.stack(moved).cpu(),
        tokens=int(lengths.sum()),
        texts=len(tokens),
    )


def written_by_groups(x_Th: torch.Tensor, weight_dh: torch.Tensor, groups: int) -> torch.Tensor:
    """Length [T, g] of what each group of heads writes to the residual stream, from the output projection's input."""
    weight_gde = weight_dh.unflatten(1, (groups, -1)).transpose(0, 1)
    gram_gee = weight_gde.transpose(1, 2) @ weight_gde  # e * e per token instead of d * e
    x_gTe = x_Th.unflatten(1, (groups, -1)).transpose(0, 1)
    return ((x_gTe @ gram_gee) * x_gTe).sum(-1).clamp(min=0).sqrt().T


def magnitude(backbone: PreTrainedModel) -> Importance:
    """Scores from the weights alone: the norm of all that belongs to a part."""
    config = backbone.config
    family, sizes, layers = family_of(config), axis_sizes(config), config.num_hidden_layers
    squares = {
        "hidden": torch.zeros(sizes["hidden"], dtype=torch.float64),
        "ffn": torch.zeros(layers, sizes["ffn"], dtype=torch.float64),
        "kv_heads": torch.zeros(layers, config.num_key_value_heads, dtype=torch.float64),
        "layers": torch.zeros(layers, dtype=torch.float64),
    }
    for name, value in backbone.state_dict().items():
        axes = family.weight(name).axes
        square = value.double().square().cpu()
        if len(axes) == 1:
            continue  # norms are of the residual stream's size, not of a part's
        along = {axis: square.sum(1 - dimension) for dimension, axis in enumerate(axes)}
        squares["hidden"] += along["hidden"]
        if name.startswith("layers."):
            layer = int(name.split(".")[1])
            squares["layers"][layer] += square.sum()
            for axis in {"heads", "kv_heads"} & along.keys():
                squares["kv_heads"][layer] += along[axis].unflatten(0, (config.num_key_value_heads, -1)).sum(1)
            if "ffn" in along:
                squares["ffn"][layer] += along["ffn"]
    return Importance(*(squares[name].sqrt() for name in ("hidden", "ffn", "kv_heads", "layers")))


def chance(config: PreTrainedConfig, seed: int) -> Importance:
    """Random scores, the same for the same seed: the least that a choice by scores must beat."""
    layers, generator = config.num_hidden_layers, np.random.default_rng(seed)
    shapes = (
        (config.hidden_size,),
        (layers, config.intermediate_size),
        (layers, config.num_key_value_heads),
        (layers,),
    )
    return Importance(*(torch.from_numpy(generator.random(shape)) for shape in shapes))


def _sum(x_Tc: torch.Tensor) -> torch.Tensor:
    return x_Tc.sum(0, dtype=torch.float64)
