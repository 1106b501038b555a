"""Attention over texts that lie end to end: no padding, and no text sees another.

On CUDA it is torch's variable-length flash attention. Elsewhere each text is attended to by itself, which is slow
and there to test against: on CPU the encoder pads texts of similar lengths instead.
Shapes: n texts, T tokens of all, h heads, g key-value heads, e head dim.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "f2llm_varlen"
"""Name of this attention in transformers. It has no mask function there, so no mask is made."""


def packs(backbone: PreTrainedModel) -> bool:
    """Whether a model takes texts end to end; made to when it is on CUDA in a precision that the kernel has."""
    if backbone.device.type == "cuda" and backbone.dtype in {torch.bfloat16, torch.float16}:
        use_varlen(backbone)
    return bool(backbone.config._attn_implementation == NAME)  # noqa: SLF001 - transformers has no public one


def use_varlen(backbone: PreTrainedModel) -> None:
    """Makes a model attend by `varlen_attention`; its weights and its export stay as they are."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, varlen_attention)
    if backbone.config._attn_implementation != NAME:  # noqa: SLF001
        backbone.set_attn_implementation(NAME)


def varlen_attention(
    module: torch.nn.Module,
    q_1hTe: torch.Tensor,
    k_1gTe: torch.Tensor,
    v_1gTe: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    starts_n1: torch.Tensor,
    longest: int,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each text, as transformers calls it.

    Args:
        module: the attention layer.
        q_1hTe: queries.
        k_1gTe: keys.
        v_1gTe: values.
        attention_mask: none is needed.
        scaling: factor of the scores.
        starts_n1: first token of each text, and T [n + 1], int32.
        longest: tokens of the longest text.
        sliding_window: tokens that a token sees, itself among them; all before it when unset.

    Returns:
        The output [1, T, h, e].
    """
    del module, attention_mask
    if q_1hTe.device.type != "cuda":
        return _one_by_one(q_1hTe, k_1gTe, v_1gTe, scaling, starts_n1.tolist(), sliding_window), None
    from torch.nn.attention.varlen import varlen_attn

    q_The, k_Tge, v_Tge = (x[0].transpose(0, 1) for x in (q_1hTe, k_1gTe, v_1gTe))
    out_The = varlen_attn(
        q_The,
        k_Tge,
        v_Tge,
        starts_n1,
        starts_n1,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=q_The.shape[1] != k_Tge.shape[1],
    )
    return cast(torch.Tensor, out_The)[None], None


def _one_by_one(
    q_1hTe: torch.Tensor,
    k_1gTe: torch.Tensor,
    v_1gTe: torch.Tensor,
    scaling: float,
    starts: list[int],
    sliding_window: int | None,
) -> torch.Tensor:
    found = []
    for first, last in pairwise(starts):
        q, k, v = (x[:, :, first:last] for x in (q_1hTe, k_1gTe, v_1gTe))
        place = torch.arange(last - first)
        behind = place[:, None] - place[None, :]
        seen = (behind >= 0) & (behind < (sliding_window or last - first))
        found.append(scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=True))
    return torch.cat(found, dim=2).transpose(1, 2)
