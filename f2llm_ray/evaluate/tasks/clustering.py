"""Clustering: do k-means clusters of a model's vectors agree with the labels?

Each language is clustered by itself, into as many clusters as it has labels, and scored by V-measure (as mteb's).

Shapes: n texts, m dims.
"""

from __future__ import annotations

import warnings
from typing import ClassVar

import numpy as np

from f2llm_ray.base.optional import require
from f2llm_ray.base.section import Content, Output
from f2llm_ray.data.reading.base import DEFAULT_INSTRUCTION
from f2llm_ray.evaluate.metrics import weighted_metrics
from f2llm_ray.evaluate.metrics.intervals import Values
from f2llm_ray.evaluate.tasks.labelled import Columns, LabelledFile, LabelledSet, Scoring, codes
from f2llm_ray.evaluate.vectors import Embedder, as_queries, embed_distinct
from f2llm_ray.model.dims import Vectors

STARTS = 5
"""K-means keeps the best of this many starts."""


class ClusteringSet(LabelledFile):
    """Labelled texts whose clusters are compared with their labels."""

    test: Content[str]
    """Table with the columns text and label; a language has at least two labels."""
    instruction: Output[str] = DEFAULT_INSTRUCTION["clustering"]
    """Said before each text to models trained with instructions."""


class Clustering(LabelledSet):
    """Texts and the label of each."""

    kind: ClassVar[str] = "clustering"
    section = ClusteringSet
    columns: ClassVar[Columns] = {"test": {"text": "text", "label": "label"}}
    metrics: ClassVar[weighted_metrics.Metrics] = {"v_measure": weighted_metrics.v_measure}

    def check(self) -> None:
        """Raises DataError where a language has one label only, so that any clustering fits."""
        labels = np.array(self.values("label"), dtype=np.str_)
        for language, rows_k in self.by_language().items():
            if len(np.unique(labels[rows_k])) < 2:
                self.refuse(f"language {language!r}: found 1 label, expected at least 2")

    def scoring(self, encoder: Embedder) -> Scoring:
        """Texts carry the instruction."""
        texts = as_queries(encoder, self.values(), self.instruction)
        encoded = embed_distinct(encoder, texts)
        text_n, label_n = encoded.of(texts), codes(self.values("label"), self.values("label"))

        def score(cut_ud: Vectors) -> dict[str, Values]:
            cluster_n = np.empty(len(text_n))
            for rows_k in self.by_language().values():
                cluster_n[rows_k] = _clusters(cut_ud[text_n[rows_k]], len(np.unique(label_n[rows_k])))
            return {"v_measure": cluster_n}

        return Scoring(encoded, score, target_n=label_n)


def _clusters(vectors_nd: Vectors, count: int) -> Values:
    means = require("sklearn.cluster", extra="eval").KMeans(count, n_init=STARTS, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct vectors than clusters: some stay empty
        found: Values = means.fit_predict(vectors_nd).astype(np.float64)
    return found
