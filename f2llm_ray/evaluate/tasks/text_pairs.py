"""Pairs of texts: does the cosine of two texts say how alike they are (STS), or whether they belong together?

Shapes: n pairs, m dims.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from f2llm_ray.base.section import Content, Output
from f2llm_ray.evaluate.metrics import weighted_metrics
from f2llm_ray.evaluate.tasks.labelled import Columns, LabelledFile, LabelledSet, Scoring
from f2llm_ray.evaluate.vectors import Embedder, as_queries, cosines, embed_distinct


class TextPairsSet(LabelledFile):
    """What the entries of both kinds of pairs have."""

    instruction: Output[str] = "Retrieve semantically similar text."
    """Said before both texts to models trained with instructions."""


class StsSet(TextPairsSet):
    """Pairs of texts with a grade of how alike they are."""

    test: Content[str]
    """Table with the columns text_a, text_b and score, higher for more alike, on any scale."""


class PairClassificationSet(TextPairsSet):
    """Pairs of texts that belong together or do not."""

    test: Content[str]
    """Table with the columns text_a, text_b and label, 1 or 0; a language has both."""


class TextPairs(LabelledSet):
    """Pairs of texts that are scored by their cosine against a number."""

    asked: ClassVar[tuple[str, ...]] = ("text_a", "text_b")
    target: ClassVar[str]
    """Column of the number."""

    def scoring(self, encoder: Embedder) -> Scoring:
        """Both texts carry the instruction."""
        sides = [as_queries(encoder, self.values(side), self.instruction) for side in self.asked]
        encoded = embed_distinct(encoder, [*sides[0], *sides[1]])
        a_n, b_n = map(encoded.of, sides)
        return Scoring(
            encoded,
            lambda cut_ud: dict.fromkeys(self.metrics, cosines(cut_ud, a_n, b_n)),
            target_n=np.array(self.values(self.target)),
        )


class Sts(TextPairs):
    """Semantic textual similarity: pairs with a grade, higher for more alike, on any scale."""

    kind: ClassVar[str] = "sts"
    section = StsSet
    columns: ClassVar[Columns] = {"test": {"text_a": "text", "text_b": "text", "score": "number"}}
    target: ClassVar[str] = "score"
    metrics: ClassVar[weighted_metrics.Metrics] = {
        "spearman": weighted_metrics.spearman,
        "pearson": weighted_metrics.pearson,
    }

    def check(self) -> None:
        """Raises DataError where all pairs of a language have the same grade, which no order fits."""
        score_n = np.array(self.values(self.target))
        for language, rows_k in self.by_language().items():
            if np.ptp(score_n[rows_k]) == 0:
                self.refuse(f"language {language!r}: found one score for all its pairs, expected at least 2")


class PairClassification(TextPairs):
    """Pairs that belong together (label 1), as paraphrases do, and pairs that do not (label 0)."""

    kind: ClassVar[str] = "pair_classification"
    section = PairClassificationSet
    columns: ClassVar[Columns] = {"test": {"text_a": "text", "text_b": "text", "label": "number"}}
    target: ClassVar[str] = "label"
    metrics: ClassVar[weighted_metrics.Metrics] = {
        "ap": weighted_metrics.average_precision,
        "accuracy": weighted_metrics.best_accuracy,
        "f1": weighted_metrics.best_f1,
    }

    def check(self) -> None:
        """Raises DataError where a label is not 0 or 1, or a language does not have both."""
        label_n = np.array(self.values(self.target))
        for row in np.flatnonzero(~np.isin(label_n, (0, 1))).tolist():
            self.refuse(f"found {label_n[row]:g} as label, expected 0 or 1", row)
        for language, rows_k in self.by_language().items():
            if np.ptp(label_n[rows_k]) == 0:
                self.refuse(f"language {language!r}: found only label {label_n[rows_k][0]:g}, expected 0 and 1")
