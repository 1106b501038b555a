"""Classification: how well a simple classifier predicts labels from a model's vectors.

Two probes are fitted on the vectors of the labelled training texts, in all languages together: logistic regression
with scikit-learn's regularisation, as mteb's, and the 5 nearest neighbours.

Shapes: n test texts, m dims.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from f2llm_ray.base.optional import require
from f2llm_ray.base.section import Content, Output
from f2llm_ray.data.decontaminate import Screened
from f2llm_ray.data.reading.base import DEFAULT_INSTRUCTION
from f2llm_ray.evaluate.metrics import weighted_metrics
from f2llm_ray.evaluate.metrics.intervals import Values
from f2llm_ray.evaluate.tasks.labelled import Columns, LabelledFile, LabelledSet, Scoring, codes
from f2llm_ray.evaluate.vectors import Embedder, as_queries, embed_distinct
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

    kind: ClassVar[str] = "classification"
    section = ClassificationSet
    columns: ClassVar[Columns] = {
        "test": {"text": "text", "label": "label"},
        "train": {"text": "text", "label": "label"},
    }
    metrics: ClassVar[weighted_metrics.Metrics] = {
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

    def scoring(self, encoder: Embedder) -> Scoring:
        """Texts carry the instruction."""
        texts, fitted = (
            as_queries(encoder, table["text"].to_pylist(), self.instruction) for table in (self.test, self.train)
        )
        encoded = embed_distinct(encoder, [*texts, *fitted])
        test_n, train_k = encoded.of(texts), encoded.of(fitted)
        known = self.train["label"].to_pylist()
        label_n, label_k = codes(self.values("label"), known), codes(known, known)

        def score(cut_ud: Vectors) -> dict[str, Values]:
            found = {}
            for prefix, probe in _probes(len(train_k)).items():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a probe stopped at ITERATIONS is one all the same
                    class_n = probe.fit(cut_ud[train_k], label_k).predict(cut_ud[test_n])
                found[f"{prefix}accuracy"] = (class_n == label_n).astype(np.float64)
                found[f"{prefix}macro_f1"] = class_n
            return found

        return Scoring(encoded, score, len(train_k), label_n)


def _probes(count: int) -> dict[str, Any]:
    """The two probes for a number of training texts, by the prefix of their metrics."""
    linear, neighbors = (require(f"sklearn.{name}", extra="eval") for name in ("linear_model", "neighbors"))
    return {
        "": linear.LogisticRegression(max_iter=ITERATIONS),
        # Among unit vectors the nearest are those of the highest cosine.
        "knn_": neighbors.KNeighborsClassifier(min(NEIGHBOURS, count), algorithm="brute"),
    }
