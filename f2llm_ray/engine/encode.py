"""The encoder: token lists in, one vector each out, with little or no padding.

Training, evaluation, the teacher, bulk embedding and serving all come through `encode`.
Shapes: n texts, t tokens of the longest text of a pass, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine.attention import packs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A pass of at least this many tokens is long enough to keep two cores busy; from there on a text much shorter
# than the longest of the pass starts a new one.
FULL_PASS = 1024
SHORTEST = 0.8


def plan_passes(lengths: Sequence[int], tokens_per_pass: int) -> list[list[int]]:
    """Groups texts of similar lengths into passes, longest first.

    A pass holds at most `tokens_per_pass` tokens, padding included (a single longer text is a pass of its
    own), and once it holds `FULL_PASS` tokens it takes no text shorter than `SHORTEST` of its longest.

    Returns:
        The indices of the texts of each pass; together they are 0..n-1, each once.
    """
    passes: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        width = len(passes[-1]) if passes else 0
        full = (width + 1) * longest > tokens_per_pass
        uneven = width * longest >= FULL_PASS and lengths[index] < SHORTEST * longest
        if not passes or full or uneven:
            passes.append([])
            longest = lengths[index]
        passes[-1].append(index)
    return passes


def plan_packs(lengths: Sequence[int], tokens_per_pass: int) -> list[list[int]]:
    """Groups texts, in their order, into passes of at most `tokens_per_pass` tokens; a longer text has its own."""
    passes: list[list[int]] = []
    held = 0
    for index, length in enumerate(lengths):
        if not passes or held + length > tokens_per_pass:
            passes.append([])
            held = 0
        passes[-1].append(index)
        held += length
    return passes


def passes_of(backbone: PreTrainedModel, tokens: Sequence[Tokens], tokens_per_pass: int) -> list[list[int]]:
    """The passes in which a model encodes texts: indices of the texts of each, every text once."""
    lengths = [len(text) for text in tokens]
    return (plan_packs if packs(backbone) else plan_passes)(lengths, tokens_per_pass)


def encode(backbone: PreTrainedModel, tokens: Sequence[Tokens], *, tokens_per_pass: int) -> torch.Tensor:
    """Turns token lists into vectors [n, d] in the given order, before normalisation.

    Last-token pooling (paper) over a causal decoder of Hugging Face's without its language-model head; EOS is the
    last token of each text. On CUDA the texts of a pass lie end to end (`engine/attention.py`). On CPU they are of
    similar lengths and padded on the right, where a causal model never looks from a real token, so no mask is
    needed: a vector depends on its text alone.
    """
    if not tokens:
        return torch.zeros(0, backbone.config.hidden_size, device=backbone.device)
    passes = passes_of(backbone, tokens, tokens_per_pass)
    vectors = [encode_pass(backbone, [tokens[index] for index in indices]) for indices in passes]
    order = torch.tensor([index for indices in passes for index in indices], device=backbone.device)
    return torch.cat(vectors)[torch.argsort(order)]


def encode_pass(backbone: PreTrainedModel, tokens: Sequence[Tokens]) -> torch.Tensor:
    """The vectors [n, d] of the texts of one pass: packed into one row, or padded on the right."""
    return (_packed_pass if packs(backbone) else _padded_pass)(backbone, tokens)


def _packed_pass(backbone: PreTrainedModel, tokens: Sequence[Tokens]) -> torch.Tensor:
    lengths = np.array([len(text) for text in tokens])
    starts = np.append(0, np.cumsum(lengths))
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)

    def tensor(values: np.ndarray[Any, Any], dtype: type = np.int64) -> torch.Tensor:
        return torch.from_numpy(values.astype(dtype)).to(backbone.device)

    hidden_1Td = backbone(
        input_ids=tensor(np.concatenate(tokens))[None],
        position_ids=tensor(positions)[None],
        use_cache=False,
        starts_n1=tensor(starts, np.int32),
        longest=int(lengths.max()),
    ).last_hidden_state
    return hidden_1Td[0, tensor(starts[1:] - 1)]


def _padded_pass(backbone: PreTrainedModel, tokens: Sequence[Tokens]) -> torch.Tensor:
    lengths = np.array([len(text) for text in tokens])
    padded = np.zeros((len(tokens), lengths.max()), dtype=np.int64)
    for row, text in zip(padded, tokens, strict=True):
        row[: len(text)] = text
    input_ids_nt = torch.from_numpy(padded).to(backbone.device)
    hidden_ntd = backbone(input_ids=input_ids_nt, use_cache=False).last_hidden_state
    last_n = torch.from_numpy(lengths - 1).to(backbone.device)
    return hidden_ntd[torch.arange(len(tokens), device=backbone.device), last_n]
