"""Pooling: the hidden states of a pass's tokens become one vector a text.

Shapes: n texts, T places of a pass, padding included, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from f2llm_ray.data.ragged import Ints, ranges
from f2llm_ray.model.families import Pooling


@dataclass(frozen=True, eq=False)
class Places:
    """Where the texts of a pass lie in it; on the host, so that a GPU is not waited for."""

    lengths_n: Ints
    """Tokens of each text."""
    starts_n: Ints
    """The place of each text's first token."""

    @classmethod
    def packed(cls, lengths_n: Ints) -> Places:
        """Of texts that lie end to end."""
        return cls(lengths_n, lengths_n.cumsum() - lengths_n)

    @classmethod
    def padded(cls, lengths_n: Ints) -> Places:
        """Of texts that are padded on the right to the longest."""
        return cls(lengths_n, np.arange(len(lengths_n)) * lengths_n.max())

    @property
    def tokens(self) -> Ints:
        """The places of all tokens, text by text."""
        return ranges(self.starts_n, self.lengths_n)


def pool(hidden_Td: torch.Tensor, places: Places, pooling: Pooling) -> torch.Tensor:
    """The vectors [n, d] of the texts of a pass, before normalisation; each of its own tokens alone."""

    def tensor(values: Ints) -> torch.Tensor:
        return torch.from_numpy(values).to(hidden_Td.device)

    if pooling == "last":
        return hidden_Td[tensor(places.starts_n + places.lengths_n - 1)]
    if pooling == "cls":
        return hidden_Td[tensor(places.starts_n)]
    # Summed in float32: bf16 loses what a token adds to a sum of many.
    tokens_Td = hidden_Td[tensor(places.tokens)].to(torch.promote_types(hidden_Td.dtype, torch.float32))
    texts = len(places.lengths_n)
    text_T = tensor(np.repeat(np.arange(texts), places.lengths_n))
    sums_nd = tokens_Td.new_zeros(texts, hidden_Td.shape[1]).index_add_(0, text_T, tokens_Td)
    return (sums_nd / tensor(places.lengths_n)[:, None]).to(hidden_Td.dtype)
