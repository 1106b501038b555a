"""A task: something that a model is measured on. Every kind of task is a `Task` and gives `Measured`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypedDict

import pyarrow as pa

from f2llm_ray.data.decontaminate import Screened

if TYPE_CHECKING:
    from f2llm_ray.evaluate.encode import Encoder
    from f2llm_ray.run.folder import Folder

Kind = Literal["retrieval", "bitext", "classification", "clustering", "sts", "pair_classification", "reranking"]


class Scores(TypedDict):
    """What a model scores on a task, as JSON values; dims are strings."""

    kind: Kind
    metric: str
    """The main metric of this kind."""
    scores: dict[str, dict[str, Any]]
    """By dim: each metric; "ci", the 95 % interval [low, high] of the main one; "macro", the mean of the main
    metric over languages, each counting once, and "macro_ci". A metric is the mean of its values by language,
    weighted by their numbers of queries; where it is a mean over queries, that is the mean over all of them."""
    languages: dict[str, dict[str, dict[str, Any]]]
    """By dim and language: "queries", how many there are, each metric over them alone, and "ci"."""
    queries: int
    """What is scored: queries, or the texts or pairs of a labelled set."""
    corpus: int
    """What they are held against: passages, translations, candidates or labelled texts; 0 where there are none."""
    seconds: float
    tokens: int
    """Tokens encoded, each distinct text once."""
    types: dict[str, dict[str, float]]
    """By trained dim and type of vector: the main metric over some of the queries; only retrieval has it."""


class Measured(NamedTuple):
    """Scores, and what they are computed from."""

    scores: Scores
    units: pa.Table
    """One row per query, text or pair, in the task's order: `id`, `language`, `target` (null where the kind has
    none), and a column per dim, named by it. What they hold is what `summary.compare` needs of two models."""


class Task(Protocol):
    """What a model is measured on."""

    kind: ClassVar[Kind]

    @property
    def name(self) -> str:
        """The set's name in the recipe and in the report."""

    @property
    def instruction(self) -> str:
        """Said before queries to models trained with instructions; "" for none."""

    def screened(self) -> Screened:
        """The texts that must not be trained on."""

    def write(self, folder: Folder) -> None:
        """Writes the task for `kinds.read_task`: its tables, and kind, name and instruction as set.json, last."""

    def measure(self, encoder: Encoder, divisors: Sequence[int]) -> Measured:
        """Encodes the task's texts once and scores them at several dims.

        Args:
            encoder: the model.
            divisors: the dims, as the model's d divided by these.

        Raises:
            RunError: the model gives vectors that are not numbers.
        """
