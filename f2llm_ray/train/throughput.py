"""The work of a batch: the positions that the encoder computes, padding included, and the FLOPs of its texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine.attention import packs
from f2llm_ray.engine.encode import passes_of
from f2llm_ray.model.sizes import count_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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

    Kaplan et al. 2020 (section 2.1): two per token and parameter outside the embeddings, and two per layer, query
    channel and pair of tokens, of which a causal model sees half. PaLM's MFU (Chowdhery et al. 2022).
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        config = backbone.config
        self.per_token = 6 * count_parameters(backbone)[1]
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.per_pair = 6 * config.num_hidden_layers * config.num_attention_heads * head_dim

    def __call__(self, tokens: Sequence[Tokens]) -> float:
        """FLOPs of a step on these texts."""
        lengths = [len(text) for text in tokens]
        return float(self.per_token * sum(lengths) + self.per_pair * sum(length * length for length in lengths))


def peak_flops_per_second(precision: str) -> float | None:
    """Peak of this process's GPU in dense bf16 products; None on CPU, in fp32 and for a GPU that is not listed."""
    import torch

    if precision != "bf16" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)
