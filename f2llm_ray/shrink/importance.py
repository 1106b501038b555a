"""Importance: which parts of a model move its embeddings, measured on calibration text.

Shapes: n texts, t tokens of a pass, l layers, r norms that read the residual stream, d hidden channels, f FFN
channels, g key-value heads (each with the query heads that share it), e channels of a group's heads together.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine.encode import encode_pass, passes_of, places_of, vectors_of
from f2llm_ray.model.dense import parts_of
from f2llm_ray.model.families import Pooling, axis_sizes, family_of, kv_heads
from f2llm_ray.model.prune import Importance

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


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
def measure(
    backbone: PreTrainedModel, tokens: Sequence[Tokens], *, pooling: Pooling, tokens_per_pass: int
) -> Sums:
    """Runs calibration texts, at least one, through a model in evaluation mode and sums what its parts do.

    Padding does not count. Skipping a layer runs only those after it, from the inputs that the whole pass left:
    l / 2 passes for l layers. The inputs of all layers are held for a pass of `tokens_per_pass`.

    Raises:
        RunError: the model is of a family that cannot be pruned.
    """
    passes = passes_of(backbone, tokens, tokens_per_pass)
    texts = ([tokens[index] for index in indices] for indices in passes)
    return reduce(add, [_Pass(backbone, some, pooling).sums() for some in texts])


class _Pass:
    """One forward pass with what its parts do seen, and the inputs of its layers held."""

    def __init__(self, backbone: PreTrainedModel, tokens: Sequence[Tokens], pooling: Pooling) -> None:
        self.backbone, self.family, self.pooling = backbone, family_of(backbone.config), pooling
        self.layers = self.family.layers_of(backbone)
        self.places = places_of(backbone, tokens)
        self.texts, self.tokens = len(tokens), sum(map(len, tokens))
        self.real_T = torch.from_numpy(self.places.tokens).to(backbone.device)
        self.hidden: list[torch.Tensor] = []
        self.ffn: list[torch.Tensor] = []
        self.kv_heads: list[torch.Tensor] = []
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        with self._watching():
            self.whole_nd = encode_pass(backbone, tokens, pooling)

    def sums(self) -> Sums:
        return Sums(
            hidden_rd=torch.stack(self.hidden).cpu(),
            ffn_lf=torch.stack(self.ffn).cpu(),
            kv_heads_lg=torch.stack(self.kv_heads).cpu(),
            layers_l=torch.stack([self._moved(layer) for layer in range(len(self.calls))]).cpu(),
            tokens=self.tokens,
            texts=self.texts,
        )

    def _moved(self, skipped: int) -> torch.Tensor:
        """How far the vectors turn when a layer passes its input on unchanged."""
        x_ntd, after = self.calls[skipped][0][0], slice(skipped + 1, None)
        for layer, (others, keywords) in zip(self.layers[after], self.calls[after], strict=True):
            x_ntd = layer(x_ntd, *others[1:], **keywords)
        hidden_ntd = self.family.last_norm(self.backbone, x_ntd)
        without_nd = vectors_of(self.backbone, hidden_ntd.flatten(0, -2), self.places, self.pooling)
        return (1 - cosine_similarity(self.whole_nd.double(), without_nd.double(), dim=-1)).sum()

    def _watching(self) -> ExitStack:
        """Hooks on all that is scored; closing them takes them off."""
        hooks, family = ExitStack(), self.family
        for layer in self.layers:
            hooks.callback(layer.register_forward_pre_hook(self._see_call, with_kwargs=True).remove)
            for norm in family.readers:
                hooks.callback(layer.get_submodule(norm).register_forward_hook(self._see_hidden).remove)
            out, ffn = (layer.get_submodule(name) for name in (family.attention_out, family.ffn_out))
            hooks.callback(out.register_forward_hook(self._see_heads).remove)
            hooks.callback(ffn.register_forward_hook(self._see_ffn).remove)
        if family.norm is not None:
            last = self.backbone.get_submodule(family.norm)
            hooks.callback(last.register_forward_hook(self._see_hidden).remove)
        return hooks

    def _see_call(self, _layer: torch.nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.calls.append((args, keywords))

    def _see_hidden(self, _norm: torch.nn.Module, _inputs: Any, x_ntd: torch.Tensor) -> None:
        self.hidden.append(self._sum(x_ntd.flatten(0, -2).abs()))

    def _see_ffn(self, down: torch.nn.Module, inputs: tuple[torch.Tensor], _output: Any) -> None:
        reach_f = down.get_parameter("weight").double().norm(dim=0)
        self.ffn.append(self._sum(inputs[0].flatten(0, -2).abs()) * reach_f)

    def _see_heads(self, out: torch.nn.Module, inputs: tuple[torch.Tensor], _output: Any) -> None:
        groups = kv_heads(self.backbone.config)
        written_Tg = written_by_groups(inputs[0].flatten(0, -2), out.get_parameter("weight"), groups)
        self.kv_heads.append(self._sum(written_Tg))

    def _sum(self, x_Tc: torch.Tensor) -> torch.Tensor:
        return x_Tc[self.real_T].sum(0, dtype=torch.float64)


def written_by_groups(x_Th: torch.Tensor, weight_dh: torch.Tensor, groups: int) -> torch.Tensor:
    """Length [T, g] of what each group of heads writes, from the input and weight of the output projection."""
    weight_gde = weight_dh.unflatten(1, (groups, -1)).transpose(0, 1)
    gram_gee = weight_gde.transpose(1, 2) @ weight_gde  # e * e per token instead of d * e
    x_gTe = x_Th.unflatten(1, (groups, -1)).transpose(0, 1)
    return ((x_gTe @ gram_gee) * x_gTe).sum(-1).clamp(min=0).sqrt().T


def magnitude(backbone: PreTrainedModel) -> Importance:
    """Scores from the weights alone: the norm of all that belongs to a part."""
    config = backbone.config
    family, sizes, layers, groups = (
        family_of(config),
        axis_sizes(config),
        config.num_hidden_layers,
        kv_heads(config),
    )
    squares = {
        "hidden": torch.zeros(sizes["hidden"], dtype=torch.float64),
        "ffn": torch.zeros(layers, sizes["ffn"], dtype=torch.float64),
        "kv_heads": torch.zeros(layers, groups, dtype=torch.float64),
        "layers": torch.zeros(layers, dtype=torch.float64),
    }
    for name, value in parts_of(backbone.state_dict())[0].items():
        axes = family.weight(name).axes
        square = value.double().square().cpu()
        if len(axes) == 1:
            continue  # norms and biases are of the residual stream's size, not of a part's
        along: dict[str, torch.Tensor] = {axis: square.sum(1 - place) for place, axis in enumerate(axes)}
        squares["hidden"] += along["hidden"]
        layer = family.layer_of(name)
        if layer is None:
            continue
        squares["layers"][layer] += square.sum()
        for axis in {"heads", "kv_heads"} & along.keys():
            squares["kv_heads"][layer] += along[axis].unflatten(0, (groups, -1)).sum(1)
        if "qkv" in along:
            squares["kv_heads"][layer] += along["qkv"].unflatten(0, (3, groups, -1)).sum((0, 2))
        if "ffn" in along:
            squares["ffn"][layer] += along["ffn"]
        if "ffn_pair" in along:
            squares["ffn"][layer] += along["ffn_pair"].unflatten(0, (2, -1)).sum(0)
    return Importance(*(squares[name].sqrt() for name in ("hidden", "ffn", "kv_heads", "layers")))


def chance(config: PreTrainedConfig, seed: int) -> Importance:
    """Random scores, the same for the same seed: the least that a choice by scores must beat."""
    layers, generator = config.num_hidden_layers, np.random.default_rng(seed)
    shapes = (
        (config.hidden_size,),
        (layers, config.intermediate_size),
        (layers, kv_heads(config)),
        (layers,),
    )
    return Importance(*(torch.from_numpy(generator.random(shape)) for shape in shapes))
