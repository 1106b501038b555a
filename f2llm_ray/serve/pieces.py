"""What the engine embeds for the inputs of a request: each as it is, cut, or in parts whose vectors are averaged.

Shapes: n inputs, m pieces, d dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from f2llm_ray.data.tokens.store import Tokens, cut
from f2llm_ray.model.dims import Vectors, unit
from f2llm_ray.serve.settings import LongText


@dataclass(frozen=True)
class Pieces:
    """Token lists, in the order of the inputs that they belong to."""

    tokens: list[Tokens]
    counts: list[int]
    """Pieces of each input."""
    truncated: int = 0
    """Inputs that were cut."""
    chunked: int = 0
    """Inputs of several pieces."""

    @property
    def size(self) -> int:
        """Tokens of all pieces, prompts and EOS included."""
        return sum(map(len, self.tokens))

    def joined(self, vectors_md: Vectors) -> Vectors:
        """Unit vectors [n, d] of the inputs: the normalised mean of their pieces', weighed by tokens."""
        if len(self.tokens) == len(self.counts):
            return vectors_md
        weights_m1 = np.fromiter(map(len, self.tokens), np.float32, len(self.tokens))[:, None]
        starts_n = np.cumsum([0, *self.counts[:-1]])
        mean_nd = unit(np.add.reduceat(vectors_md * weights_m1, starts_n, axis=0))
        several_n1 = np.array(self.counts)[:, None] > 1
        return np.where(several_n1, mean_nd, vectors_md[starts_n])


def pieces_of(
    tokens: Sequence[Tokens], long_text: LongText, max_tokens: int, *, prefix: Tokens, prompt: Tokens
) -> Pieces:
    """The pieces of inputs, given as whole token lists or, where they are to be cut, no less than their start.

    Args:
        tokens: of each input: the template's prefix, the prompt, the text, EOS. Too long ones were refused before
            where they are to be.
        long_text: what is done with an input of more than `max_tokens`.
        max_tokens: most tokens of a piece.
        prefix: the tokens that the template starts a text with.
        prompt: the tokens of the prompt, which stand in each piece of an input.
    """
    over = sum(len(ids) > max_tokens for ids in tokens)
    if not over or long_text != "chunk":
        return Pieces([cut(ids, max_tokens) for ids in tokens], [1] * len(tokens), truncated=over)
    parts = [chunks(ids, max_tokens, prefix=prefix, prompt=prompt) for ids in tokens]
    return Pieces([piece for found in parts for piece in found], list(map(len, parts)), chunked=over)


def chunks(ids: Tokens, max_tokens: int, *, prefix: Tokens, prompt: Tokens) -> list[Tokens]:
    """The parts of a token list, as equal in length as they can be, each with the prefix, the prompt and EOS."""
    if len(ids) <= max_tokens:
        return [ids]
    lead = np.concatenate([prefix, prompt]).astype(np.uint32)
    text, eos = ids[len(lead) : -1], ids[-1:]
    room = max(max_tokens - len(lead) - 1, 1)
    return [np.concatenate([lead, part, eos]) for part in np.array_split(text, -(-len(text) // room))]
