"""Importance: which parts of a model move its embeddings, measured on calibration text.

Shapes: n texts, t tokens of a pass, l layers, d hidden channels, f FFN channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cosine_similarity

from f2llm_ray.model.encoder import Tokens, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Importance:
    """Scores of a model's parts; larger matters more."""

    hidden_d: torch.Tensor
    """Mean absolute activation of each channel after the norms (as in Minitron), all norms equal in weight."""
    ffn_lf: torch.Tensor
    """Mean absolute activation of each FFN channel before the down projection, times that channel's norm in it."""
    layers_l: torch.Tensor
    """How far the embeddings turn when the layer is skipped: 1 - cosine, averaged over the texts."""


@torch.no_grad()
def measure(backbone: PreTrainedModel, tokens: Sequence[Tokens], *, tokens_per_pass: int) -> Importance:
    """Scores hidden channels, FFN channels and layers of a Qwen3-like decoder.

    Args:
        backbone: the model, in evaluation mode.
        tokens: calibration texts as token lists.
        tokens_per_pass: token budget of one forward pass.
    """
    layers = backbone.layers
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    norms.append(backbone.norm)
    norm_sums = [_Sum() for _ in norms]
    ffn_sums = [_Sum() for _ in layers]
    with (
        _watching(norms, norm_sums, outputs=True),
        _watching([x.mlp.down_proj for x in layers], ffn_sums, outputs=False),
    ):
        whole_nd = encode(backbone, tokens, tokens_per_pass=tokens_per_pass)
    hidden_d = torch.stack([total.mean() / total.mean().mean() for total in norm_sums]).mean(0)
    reach = [layer.mlp.down_proj.weight.norm(dim=0) for layer in layers]
    ffn_lf = torch.stack([total.mean() * norm for total, norm in zip(ffn_sums, reach, strict=True)])
    moved = []
    for layer in layers:
        with _skipped(layer):
            without_nd = encode(backbone, tokens, tokens_per_pass=tokens_per_pass)
        moved.append(1 - cosine_similarity(whole_nd, without_nd, dim=-1).mean())
    return Importance(hidden_d, ffn_lf, torch.stack(moved))


class _Sum:
    """Running sum of absolute activations per channel. Padding takes part: it is a few tokens of each pass."""

    def __init__(self) -> None:
        self.total: torch.Tensor | float = 0.0
        self.tokens = 0

    def add(self, x_ntc: torch.Tensor) -> None:
        self.total = self.total + x_ntc.abs().flatten(0, -2).sum(0)
        self.tokens += x_ntc.shape[:-1].numel()

    def mean(self) -> torch.Tensor:
        return torch.as_tensor(self.total) / self.tokens


@contextmanager
def _watching(modules: Sequence[torch.nn.Module], sums: Sequence[_Sum], *, outputs: bool) -> Iterator[None]:
    def hook(total: _Sum) -> Any:
        return lambda _module, inputs, output: total.add(output if outputs else inputs[0])

    handles = [module.register_forward_hook(hook(total)) for module, total in zip(modules, sums, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _skipped(layer: torch.nn.Module) -> Iterator[None]:
    """The layer passes its input on unchanged."""

    def hook(_module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
