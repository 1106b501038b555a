"""The work of a batch: the positions that the encoder computes, padding included, and the FLOPs of its texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine.attention import packs
from f2llm_ray.engine.encode import passes_of
from f2llm_ray.model.dense import dense_of
from f2llm_ray.model.families import axis_sizes, family_of
from f2llm_ray.model.sizes import count_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Floats = np.ndarray[Any, np.dtype[np.float64]]

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
}
"""Dense bf16 peaks by a part of the GPU's name, the more exact name first (NVIDIA's data sheets)."""


def positions(
    backbone: PreTrainedModel, tokens: Sequence[Tokens], chunks: Sequence[Sequence[int]], tokens_per_pass: int
) -> int:
    """Positions of one forward pass over texts: their tokens, and the padding that fills a pass on CPU.

    `chunks` are the places of the texts that are encoded together (GradCache), each once.
    """
    if packs(backbone):
        return sum(map(len, tokens))
    total = 0
    for chunk in chunks:
        texts = [tokens[place] for place in chunk]
        for places in passes_of(backbone, texts, tokens_per_pass):
            total += len(places) * max(len(texts[place]) for place in places)
    return total


class Flops:
    """FLOPs of training on texts, once forward and twice that backward; recomputation does not count.

    Half of those backward are of the weights' gradients, and a frozen weight (`lora`) has none. The gradients of
    the inputs of all layers count, though the first frozen ones need none.
    Kaplan et al. 2020 (section 2.1): two per token and parameter outside the embeddings, and four per layer, query
    channel and pair of tokens that see each other: half of all in a causal model, fewer where a layer has a
    sliding window. PaLM's MFU (Chowdhery et al. 2022).
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        config = backbone.config
        dense = dense_of(backbone)  # works once a text
        mapped = 0 if dense is None else sum(weight.numel() for weight in dense.parameters())
        inside = count_parameters(backbone)[1] - mapped
        self.per_token = 6 * inside - 2 * frozen_parameters(backbone)
        self.per_pair = 12 * axis_sizes(config)["heads"]
        self.windows = windows_of(config)
        self.causal = family_of(config).causal

    def __call__(self, tokens: Sequence[Tokens]) -> float:
        """FLOPs of a step on these texts."""
        lengths_n = np.array([len(text) for text in tokens], dtype=np.float64)
        pairs = sum(
            layers * float(seen_pairs(lengths_n, window, causal=self.causal).sum())
            for window, layers in self.windows.items()
        )
        return self.per_token * float(lengths_n.sum()) + self.per_pair * pairs


def frozen_parameters(backbone: PreTrainedModel) -> int:
    """Parameters outside the embeddings that are not trained."""
    import torch

    tables = [module for module in backbone.modules() if isinstance(module, torch.nn.Embedding)]
    looked_up = {id(value) for table in tables for value in table.parameters()}
    return sum(
        value.numel() for value in backbone.parameters() if not value.requires_grad and id(value) not in looked_up
    )


def windows_of(config: PreTrainedConfig) -> dict[int | None, int]:
    """How many layers see so many tokens to a side, the token itself among them; None is all."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    sliding = sum(kind == "sliding_attention" for kind in kinds)
    if not sliding:
        return {None: len(kinds)}
    return {None: len(kinds) - sliding, family_of(config).window(config): sliding}


def seen_pairs(lengths_n: Floats, window: int | None, *, causal: bool) -> Floats:
    """Pairs of tokens of each text [n] of which one sees the other, with half the diagonal where it is causal."""
    reach_n = lengths_n if window is None else np.minimum(lengths_n, window)
    if causal:
        return lengths_n * reach_n - reach_n * reach_n / 2
    return lengths_n * (2 * reach_n - 1) - reach_n * (reach_n - 1)


def peak_flops_per_second(precision: str) -> float | None:
    """Peak of this process's GPU in dense bf16 products; None on CPU, in fp32 and for a GPU that is not listed."""
    import torch

    if precision != "bf16" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)
