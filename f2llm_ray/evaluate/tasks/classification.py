"""Classification: how well a simple classifier predicts labels from a model's vectors.

Two probes are fitted on the vectors of the labelled training texts, in all languages together: logistic regression
with scikit-learn's regularisation, as mteb's, and the 5 nearest neighbours.

Shapes: n test texts, m dims.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pyarrow as pa

from f2llm_ray.base.optional import require
from f2llm_ray.base.section import Content, Output
from f2llm_ray.data.decontaminate import Screened
from f2llm_ray.data.reading.base import DEFAULT_INSTRUCTION
from f2llm_ray.data.reading.values import ColumnKind
from f2llm_ray.evaluate.metrics import weighted_metrics
from f2llm_ray.evaluate.metrics.intervals import Values
from f2llm_ray.evaluate.metrics.scores import measured
from f2llm_ray.evaluate.metrics.weighted_metrics import Builder
from f2llm_ray.evaluate.tasks.labelled import LabelledFile, LabelledSet, codes
from f2llm_ray.evaluate.tasks.task import Kind, Measured
from f2llm_ray.evaluate.vectors import as_queries, embed_distinct

if TYPE_CHECKING:
    from f2llm_ray.evaluate.vectors import Embedder
    from f2llm_ray.model.dims import Vectors

NEIGHBOURS = 5
ITERATIONS = 1000


class ClassificationSet(LabelledFile):
    """Labelled texts to fit a probe on and others to test it with."""

    train: Content[str]
    """Table with the columns text and label, which the probes are fitted on."""
    test: Content[str]
    """Table with the columns text and label, which the probes are tested with; `train` has all its labels."""
    instruction: Output[str] = DEFAULT_INSTRUCTION["classification"]
    """Said before each text to models trained with instructions."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Classification(LabelledSet):
    """Labelled texts to fit on and others whose labels are predicted."""

    kind: ClassVar[Kind] = "classification"
    section = ClassificationSet
    columns: ClassVar[dict[str, dict[str, ColumnKind]]] = {
        "test": {"text": "text", "label": "label"},
        "train": {"text": "text", "label": "label"},
    }
    metrics: ClassVar[dict[str, Builder]] = {
        "accuracy": weighted_metrics.mean,
        "macro_f1": weighted_metrics.macro_f1,
        "knn_accuracy": weighted_metrics.mean,
        "knn_macro_f1": weighted_metrics.macro_f1,
    }

    train: pa.Table
    """What the probes are fitted on; columns as those of `test`."""

    def check(self) -> None:
        """Raises DataError where the training texts have fewer than two labels, or lack one of the test texts'."""
        known = set(self.train["label"].to_pylist())
        if len(known) < 2:
            self.refuse(f"found {len(known)} labels to fit on, expected at least 2", table="train")
        for row, label in enumerate(self.values("label")):
            if label not in known:
                train = self.places.get("train", "train")
                self.refuse(f"found {label!r} as label, expected one of the {len(known)} of {train}", row)

    def screened(self) -> Screened:
        """Test and training texts: a model that has learnt either has learnt the labels."""
        return Screened([*self.values(), *self.train["text"].to_pylist()], [])

    def unit_texts(self) -> list[tuple[str, ...]]:
        """The test texts."""
        return self.rows("text")

    def measure(self, encoder: Embedder, divisors: Sequence[int]) -> Measured:
        """Accuracy and macro F1 of the logistic probe, and those of the nearest neighbours."""
        started = time.perf_counter()
        texts, fitted = (
            as_queries(encoder, table["text"].to_pylist(), self.instruction) for table in (self.test, self.train)
        )
        encoded = embed_distinct(encoder, [*texts, *fitted])
        test_n, train_k = encoded.of(texts), encoded.of(fitted)
        known = self.train["label"].to_pylist()
        label_n, label_k = codes(self.values("label"), known), codes(known, known)
        values = {}
        for dim, cut_ud in encoded.at_dims(divisors):
            logistic_n, nearest_n = (
                probe(cut_ud[train_k], label_k, cut_ud[test_n]) for probe in (_logistic, _nearest)
            )
            values[dim] = {
                "accuracy": (logistic_n == label_n).astype(np.float64),
                "macro_f1": logistic_n,
                "knn_accuracy": (nearest_n == label_n).astype(np.float64),
                "knn_macro_f1": nearest_n,
            }
        return measured(
            self.kind,
            self.metrics,
            self.units(label_n),
            values,
            corpus=len(train_k),
            tokens=encoded.tokens,
            started=started,
        )


def _logistic(train_kd: Vectors, label_k: Values, test_nd: Vectors) -> Values:
    probe = require("sklearn.linear_model", extra="eval").LogisticRegression(max_iter=ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a probe stopped at ITERATIONS is one all the same
        found: Values = probe.fit(train_kd, label_k).predict(test_nd)
    return found


def _nearest(train_kd: Vectors, label_k: Values, test_nd: Vectors) -> Values:
    # Among unit vectors the nearest are those of the highest cosine.
    neighbours = min(NEIGHBOURS, len(label_k))
    probe = require("sklearn.neighbors", extra="eval").KNeighborsClassifier(neighbours, algorithm="brute")
    found: Values = probe.fit(train_kd, label_k).predict(test_nd)
    return found
