"""Pooling: the hidden states of a pass's tokens become one vector a text.

Shapes: n texts, T places of a pass, padding included, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from f2llm_ray.model.families import Pooling


@dataclass(frozen=True)
class Places:
    """Where the texts of a pass lie in it."""

    lengths_n: torch.Tensor
    """Tokens of each text."""
    starts_n: torch.Tensor
    """The place of each text's first token."""

    @classmethod
    def packed(cls, lengths_n: torch.Tensor) -> Places:
        """Of texts that lie end to end."""
        return cls(lengths_n, lengths_n.cumsum(0) - lengths_n)

    @classmethod
    def padded(cls, lengths_n: torch.Tensor) -> Places:
        """Of texts that are padded on the right to the longest."""
        return cls(lengths_n, torch.arange(len(lengths_n), device=lengths_n.device) * int(lengths_n.max()))

    @property
    def ends_n(self) -> torch.Tensor:
        """The place of each text's last token."""
        return self.starts_n + self.lengths_n - 1

    @property
    def tokens(self) -> torch.Tensor:
        """The places of all tokens, text by text."""
        offset = self.lengths_n.cumsum(0) - self.lengths_n
        shift_n = self.starts_n - offset
        return torch.repeat_interleave(shift_n, self.lengths_n) + torch.arange(
            int(self.lengths_n.sum()), device=self.lengths_n.device
        )


def pool(hidden_Td: torch.Tensor, places: Places, pooling: Pooling) -> torch.Tensor:
    """The vectors [n, d] of the texts of a pass, before normalisation; each of its own tokens alone."""
    if pooling == "last":
        return hidden_Td[places.ends_n]
    if pooling == "cls":
        return hidden_Td[places.starts_n]
    # Summed in float32: bf16 loses what a token adds to a sum of many.
    tokens_Td = hidden_Td[places.tokens].to(torch.promote_types(hidden_Td.dtype, torch.float32))
    text_T = torch.repeat_interleave(
        torch.arange(len(places.lengths_n), device=hidden_Td.device), places.lengths_n
    )
    sums_nd = tokens_Td.new_zeros(len(places.lengths_n), hidden_Td.shape[1]).index_add_(0, text_T, tokens_Td)
    return (sums_nd / places.lengths_n[:, None]).to(hidden_Td.dtype)
