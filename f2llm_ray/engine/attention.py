"""Attention over texts that lie end to end: no padding, and no text sees another.

On CUDA it is torch's variable-length flash attention. Elsewhere neighbours of similar lengths are padded for the
attention alone, all other layers see real tokens only. Sorted by length, on one CPU thread that takes 1.5 ms for a
text of 21 tokens in a batch of 32 where padding all layers takes 3.0 (a 4-layer, 256-wide model). Forward and
backward over texts of 8 to 32 tokens take 0.83 of the time that they take in padded passes of similar lengths.
Shapes: n texts, T tokens of all, w texts of a group, t tokens of its longest, h heads, g key-value heads,
e head dim.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from f2llm_ray.data.ragged import ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

SHORTEST = 0.7
"""A text shorter than this share of the longest of its group starts a new one: 0.5 and 0.8 measured the same."""

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
    """Attention within each text, as transformers calls it; the output is [1, T, h, e].

    The module's `is_causal` says whether a token sees only those before it. `starts_n1` are the first token of
    each text, and T [n + 1], int32; `longest` the tokens of the longest text; `sliding_window` the tokens that a
    token sees to a side, itself among them; all when unset.
    """
    del attention_mask
    causal = bool(module.is_causal)
    if q_1hTe.device.type != "cuda":
        starts = starts_n1.tolist()
        return _by_groups(q_1hTe, k_1gTe, v_1gTe, scaling, starts, sliding_window, causal=causal), None
    from torch.nn.attention.varlen import varlen_attn

    q_The, k_Tge, v_Tge = (x[0].transpose(0, 1) for x in (q_1hTe, k_1gTe, v_1gTe))
    reach = -1 if sliding_window is None else sliding_window - 1
    out_The = varlen_attn(
        q_The,
        k_Tge,
        v_Tge,
        starts_n1,
        starts_n1,
        longest,
        longest,
        scale=scaling,
        window_size=(reach, 0 if causal else reach),
        enable_gqa=q_The.shape[1] != k_Tge.shape[1],
    )
    return cast(torch.Tensor, out_The)[None], None


@torch.compiler.disable  # its shapes are those of each batch
def _by_groups(
    q_1hTe: torch.Tensor,
    k_1gTe: torch.Tensor,
    v_1gTe: torch.Tensor,
    scaling: float,
    starts: Sequence[int],
    sliding_window: int | None,
    *,
    causal: bool,
) -> torch.Tensor:
    q_The, k_Tge, v_Tge = (x[0].transpose(0, 1) for x in (q_1hTe, k_1gTe, v_1gTe))
    found = []
    for first, last in _groups(starts):
        lengths_w = np.diff(starts[first : last + 1])
        longest, real = int(lengths_w[0]), None
        if lengths_w.min() < longest:  # where tokens lie when each text is padded on the right to the longest
            real = torch.from_numpy(ranges(np.arange(len(lengths_w)) * longest, lengths_w)).to(q_The.device)
        here = slice(starts[first], starts[last])
        q_whte, k_wgte, v_wgte = (_pad(x[here], real, len(lengths_w), longest) for x in (q_The, k_Tge, v_Tge))
        seen = _seen(lengths_w.tolist(), sliding_window, causal=causal, device=q_The.device)
        out_whte = scaled_dot_product_attention(
            q_whte,
            k_wgte,
            v_wgte,
            attn_mask=seen,
            is_causal=causal and seen is None,
            scale=scaling,
            enable_gqa=True,
        )
        out_The = out_whte.transpose(1, 2).flatten(0, 1)
        found.append(out_The if real is None else out_The.index_select(0, real))
    return torch.cat(found)[None]


def _seen(
    lengths: Sequence[int], sliding_window: int | None, *, causal: bool, device: torch.device
) -> torch.Tensor | None:
    """Which tokens [1 or w, 1, t, t] each token of a group sees; None where the flag `is_causal` says it all.

    Padding is on the right, where no causal attention looks from a real token.
    """
    longest = max(lengths)
    place = torch.arange(longest, device=device)
    seen: torch.Tensor | None = None
    if sliding_window is not None and sliding_window < longest:
        behind = place[:, None] - place[None, :]
        seen = ((behind >= 0) & (behind < sliding_window) if causal else behind.abs() < sliding_window)[None, None]
    if not causal and min(lengths) < longest:
        real = (place < torch.tensor(lengths, device=device)[:, None])[:, None, None]
        # What a padded place sees is no matter, but it must see something: softmax of nothing is NaN.
        seen = real if seen is None else seen & real | (place[:, None] == place)
    return seen


def _groups(starts: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of neighbours (first, past the last) of which none is shorter than `SHORTEST` of the run's first."""
    groups: list[tuple[int, int]] = []
    for i, (start, end) in enumerate(pairwise(starts)):
        longest = starts[groups[-1][0] + 1] - starts[groups[-1][0]] if groups else 0
        if SHORTEST * longest <= end - start <= longest:
            groups[-1] = (groups[-1][0], i + 1)
        else:
            groups.append((i, i + 1))
    return groups


def _pad(x_Tge: torch.Tensor, real: torch.Tensor | None, texts: int, longest: int) -> torch.Tensor:
    """The texts of a group [w, g, t, e], padded on the right; `real` says where each token goes, unset where even.

    One copy for the group: text by text, training's forward and backward pass takes 1.2 times as long.
    """
    if real is not None:
        x_Tge = x_Tge.new_zeros(texts * longest, *x_Tge.shape[1:]).index_copy(0, real, x_Tge)
    return x_Tge.unflatten(0, (texts, longest)).transpose(1, 2)
