"""Classification: how well a simple classifier tells labels apart by a model's vectors.

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

from f2llm_ray.base.errors import DataError
from f2llm_ray.base.optional import require
from f2llm_ray.data.decontaminate import Screened
from f2llm_ray.evaluate.encode import as_queries, encode_distinct
from f2llm_ray.evaluate.metrics import statistic
from f2llm_ray.evaluate.metrics.intervals import Values
from f2llm_ray.evaluate.metrics.summary import Metric, measured
from f2llm_ray.evaluate.tasks.labelled import Column, LabelledSet, codes
from f2llm_ray.evaluate.tasks.task import Kind, Measured

if TYPE_CHECKING:
    from f2llm_ray.evaluate.encode import Encoder
    from f2llm_ray.model.dims import Vectors

NEIGHBOURS = 5
ITERATIONS = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Classification(LabelledSet):
    """Labelled texts to fit on and others to tell."""

    kind: ClassVar[Kind] = "classification"
    columns: ClassVar[dict[str, Column]] = {"text": "text", "label": "label"}

    train: pa.Table
    """What the probes are fitted on; columns as those of `test`."""
    train_place: str = ""

    def check(self) -> None:
        """Raises DataError where the training texts have fewer than two labels, or lack one of the test texts'."""
        known = set(self.train["label"].to_pylist())
        if len(known) < 2:
            raise DataError(f"{self.train_place}: found {len(known)} labels to fit on, expected at least 2")
        for row, label in enumerate(self.values("label")):
            if label not in known:
                self.refuse(
                    f"found {label!r} as label, expected one of the {len(known)} of {self.train_place}", row
                )

    def tables(self) -> dict[str, pa.Table]:
        """Test and training texts."""
        return {"test": self.test, "train": self.train}

    def screened(self) -> Screened:
        """Test and training texts: a model that has learnt either has learnt the labels."""
        return Screened([*self.values(), *self.train["text"].to_pylist()], [])

    def measure(self, encoder: Encoder, divisors: Sequence[int]) -> Measured:
        """Accuracy and macro F1 of the logistic probe, and those of the nearest neighbours."""
        started = time.perf_counter()
        texts, fitted = (
            as_queries(encoder, table["text"].to_pylist(), self.instruction) for table in (self.test, self.train)
        )
        encoded = encode_distinct(encoder, [*texts, *fitted])
        test_n, train_k = encoded.of(texts), encoded.of(fitted)
        known = self.train["label"].to_pylist()
        label_n, label_k = codes(self.values("label"), known), codes(known, known)
        dims, logistic, nearest = [], [], []
        for dim, cut_ud in encoded.at_dims(divisors):
            dims.append(dim)
            logistic.append(_logistic(cut_ud[train_k], label_k, cut_ud[test_n]))
            nearest.append(_nearest(cut_ud[train_k], label_k, cut_ud[test_n]))
        logistic_nm, nearest_nm = np.column_stack(logistic), np.column_stack(nearest)
        label_n1 = label_n[:, None]
        return measured(
            self.kind,
            self.units(label_n),
            {
                "accuracy": Metric((logistic_nm == label_n1).astype(np.float64)),
                "macro_f1": Metric(logistic_nm, statistic.macro_f1),
                "knn_accuracy": Metric((nearest_nm == label_n1).astype(np.float64)),
                "knn_macro_f1": Metric(nearest_nm, statistic.macro_f1),
            },
            dims,
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
