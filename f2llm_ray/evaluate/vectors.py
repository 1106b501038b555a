"""Texts of an evaluation as vectors: each distinct text once, at the dims that are measured.

Shapes: n texts, u distinct ones, d dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.ragged import Ints
from f2llm_ray.data.schema import query_text
from f2llm_ray.model.dims import Vectors, cut_dims

if TYPE_CHECKING:
    from f2llm_ray.model.checkpoint import ModelInfo

TEXTS_PER_CALL = 8192


class Described(Protocol):
    """What knows how a model is used."""

    @property
    def info(self) -> ModelInfo:
        """The facts of its folder."""


class Embedder(Protocol):
    """A model that is measured: the engine over one of ours, or one from elsewhere (`engine.other_models`)."""

    info: ModelInfo
    device: str
    """Where its vectors are searched."""

    @property
    def ranges(self) -> Mapping[int, Vectors]:
        """[2, k] by dim k, for int8 vectors; may be empty."""

    def embed_counted(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors [n, d] of texts, in their order, and how many tokens the model read."""


@dataclass(frozen=True, eq=False)
class DistinctVectors:
    """Distinct texts and their vectors."""

    vectors_ud: Vectors
    row_of: dict[str, int]
    """The row of each text's vector."""
    tokens: int
    """How many tokens were read."""

    def of(self, texts: Sequence[str]) -> Ints:
        """The row of each text's vector [n]."""
        return np.array([self.row_of[text] for text in texts], dtype=np.int64)

    def at_dims(self, divisors: Sequence[int]) -> Iterator[tuple[int, Vectors]]:
        """The dims that are d divided by each of these, largest first, and the vectors cut to them."""
        hidden = self.vectors_ud.shape[1]
        dims = sorted({max(1, hidden // divisor) for divisor in divisors}, reverse=True)
        return ((dim, cut_dims(self.vectors_ud, dim)) for dim in dims)


def evenly_drawn(count: int, most: int) -> Ints:
    """Positions of at most `most` of `count` things, evenly spaced and ascending."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(np.int64))


def as_queries(encoder: Described, texts: Sequence[str], instruction: str) -> list[str]:
    """Texts as the query side's input: with the instruction where the model was trained with instructions.

    Other models get their own prompt for queries, which most do not have.
    """
    if encoder.info.instructions:
        return [query_text(text, instruction) for text in texts]
    prompt = encoder.info.prompts.get("query", "")
    return [prompt + text for text in texts]


def as_documents(encoder: Described, texts: Sequence[str]) -> list[str]:
    """Texts as passages: with the model's prompt for documents, which many do not have."""
    prompt = encoder.info.prompts.get("document", "")
    return [prompt + text for text in texts]


def embed_distinct(encoder: Embedder, texts: Sequence[str]) -> DistinctVectors:
    """Unit vectors of the distinct texts, at most `TEXTS_PER_CALL` texts at a time.

    Raises:
        RunError: the model returns vectors with NaN or infinity.
    """
    row_of = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    distinct = list(row_of)
    vectors, tokens = [], 0
    for start in range(0, len(distinct), TEXTS_PER_CALL):
        some, read = encoder.embed_counted(distinct[start : start + TEXTS_PER_CALL])
        vectors.append(some)
        tokens += read
    vectors_ud = np.concatenate(vectors)
    broken = int(np.sum(~np.isfinite(vectors_ud).all(axis=1)))
    if broken:
        raise RunError(
            f"{encoder.info.name}: the vectors of {broken} of {len(distinct)} texts are not numbers; "
            "a model whose training diverged returns such vectors"
        )
    return DistinctVectors(vectors_ud, row_of, tokens)


def joined(first: DistinctVectors, second: DistinctVectors, *names: str) -> DistinctVectors:
    """The vectors of two models, the second one's after the first one's; rows are found in each by itself.

    Raises:
        RunError: they have different dims; the message calls the models by the names.
    """
    dims = [vectors.vectors_ud.shape[1] for vectors in (first, second)]
    if dims[0] != dims[1]:
        raise RunError(f"{names[0]}: its vectors have {dims[0]} dims, those of {names[1]} {dims[1]}")
    return DistinctVectors(np.concatenate([first.vectors_ud, second.vectors_ud]), {}, first.tokens + second.tokens)


def cosines(vectors_ud: Vectors, a_n: Ints, b_n: Ints) -> np.ndarray:
    """Cosines [n] of pairs of unit vectors, given by their rows, at most `TEXTS_PER_CALL` pairs at a time."""
    found = []
    for start in range(0, len(a_n), TEXTS_PER_CALL):
        some = slice(start, start + TEXTS_PER_CALL)
        found.append(np.einsum("nd,nd->n", vectors_ud[a_n[some]], vectors_ud[b_n[some]], dtype=np.float64))
    return np.concatenate(found)
