"""Pairs of texts: does the cosine of two texts say how alike they are (STS), or whether they belong together?

Shapes: n pairs, m dims.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from f2llm_ray.data.decontaminate import Screened
from f2llm_ray.evaluate.encode import as_queries, cosines, encode_distinct
from f2llm_ray.evaluate.metrics import statistic
from f2llm_ray.evaluate.metrics.intervals import Values
from f2llm_ray.evaluate.metrics.statistic import Builder
from f2llm_ray.evaluate.metrics.summary import Metric, measured
from f2llm_ray.evaluate.tasks.labelled import Column, LabelledSet
from f2llm_ray.evaluate.tasks.task import Kind, Measured

if TYPE_CHECKING:
    from f2llm_ray.evaluate.encode import Encoder


class TextPairs(LabelledSet):
    """Pairs of texts that are scored by their cosine against a number."""

    metrics: ClassVar[dict[str, Builder]]
    """By name, the main one first."""

    @abstractmethod
    def target(self) -> Values:
        """What the cosines are held against [n]."""

    def screened(self) -> Screened:
        """Both texts of each pair."""
        return Screened([*self.values("text_a"), *self.values("text_b")], [])

    def measure(self, encoder: Encoder, divisors: Sequence[int]) -> Measured:
        """The metrics of the cosines. Both texts carry the instruction."""
        started = time.perf_counter()
        sides = [as_queries(encoder, self.values(side), self.instruction) for side in ("text_a", "text_b")]
        encoded = encode_distinct(encoder, [*sides[0], *sides[1]])
        a_n, b_n = map(encoded.of, sides)
        found = [(dim, cosines(cut_ud, a_n, b_n)) for dim, cut_ud in encoded.at_dims(divisors)]
        cosine_nm = np.column_stack([cosine_n for _, cosine_n in found])
        return measured(
            self.kind,
            self.units(self.target()),
            {name: Metric(cosine_nm, builder) for name, builder in self.metrics.items()},
            [dim for dim, _ in found],
            corpus=0,
            tokens=encoded.tokens,
            started=started,
        )


class Sts(TextPairs):
    """Semantic textual similarity: pairs with a grade, higher for more alike, on any scale."""

    kind: ClassVar[Kind] = "sts"
    columns: ClassVar[dict[str, Column]] = {"text_a": "text", "text_b": "text", "score": "number"}
    metrics: ClassVar[dict[str, Builder]] = {"spearman": statistic.spearman, "pearson": statistic.pearson}

    def check(self) -> None:
        """Raises DataError where all pairs of a language have the same grade, which no order fits."""
        score_n = self.target()
        for language, rows_k in self.by_language().items():
            if np.ptp(score_n[rows_k]) == 0:
                self.refuse(f"language {language!r}: found one score for all its pairs, expected at least 2")

    def target(self) -> Values:
        """The grades."""
        return np.array(self.values("score"))


class PairClassification(TextPairs):
    """Pairs that belong together (label 1), as paraphrases do, and pairs that do not (label 0)."""

    kind: ClassVar[Kind] = "pair_classification"
    columns: ClassVar[dict[str, Column]] = {"text_a": "text", "text_b": "text", "label": "number"}
    metrics: ClassVar[dict[str, Builder]] = {
        "ap": statistic.average_precision,
        "accuracy": statistic.best_accuracy,
        "f1": statistic.best_f1,
    }

    def check(self) -> None:
        """Raises DataError where a label is not 0 or 1, or a language does not have both."""
        label_n = self.target()
        for row in np.flatnonzero(~np.isin(label_n, (0, 1))).tolist():
            self.refuse(f"found {label_n[row]:g} as label, expected 0 or 1", row)
        for language, rows_k in self.by_language().items():
            if np.ptp(label_n[rows_k]) == 0:
                self.refuse(f"language {language!r}: found only label {label_n[rows_k][0]:g}, expected 0 and 1")

    def target(self) -> Values:
        """The labels."""
        return np.array(self.values("label"))
