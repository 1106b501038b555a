"""From what each unit of a task has to scores with intervals, and to differences between two models.

Languages are scored by themselves and resampled by themselves: the score of all is the mean of theirs, weighted by
their units, and the macro score the plain mean. So a correlation or a clustering never mixes languages, and one
round of resamples serves the intervals of every language, of all and of the macro mean.

Shapes: n units, m dims, r resamples, l languages.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from f2llm_ray.evaluate.encode import Positions
from f2llm_ray.evaluate.metrics import statistic
from f2llm_ray.evaluate.metrics.intervals import Difference, Values, bootstrap, difference, interval
from f2llm_ray.evaluate.metrics.statistic import Builder
from f2llm_ray.evaluate.tasks.task import Kind, Measured, Scores

DIGITS = 6
MAIN: dict[Kind, Builder] = {
    "retrieval": statistic.mean,
    "bitext": statistic.mean,
    "classification": statistic.mean,
    "clustering": statistic.v_measure,
    "sts": statistic.spearman,
    "pair_classification": statistic.average_precision,
    "reranking": statistic.mean,
}
"""How the main metric of each kind comes from its units."""


@dataclass(frozen=True, eq=False)
class Units:
    """What is scored: queries, texts, or pairs of texts."""

    ids: Sequence[str]
    languages: Sequence[str]
    target_n: Values | None = None
    """What the values are held against: grades, labels or classes."""

    def target(self) -> Values:
        """The targets, zeros where there are none."""
        return np.zeros(len(self.ids)) if self.target_n is None else self.target_n


@dataclass(frozen=True, eq=False)
class Metric:
    """A metric and what it is computed from."""

    value_nm: Values
    """What each unit has at each dim: the metric itself, a cosine, a class or a cluster."""
    builder: Builder = statistic.mean


class Comparison(NamedTuple):
    """Differences of the main metric between two models on one task."""

    all: Difference
    """Over all units."""
    macro: Difference
    """Of the mean over languages."""
    languages: dict[str, Difference]


def measured(
    kind: Kind,
    units: Units,
    metrics: Mapping[str, Metric],
    dims: Sequence[int],
    *,
    corpus: int,
    tokens: int,
    started: float,
) -> Measured:
    """Scores of a task.

    Args:
        kind: of the task.
        units: what is scored.
        metrics: by name, the main one first; each with a value per unit and dim.
        dims: the dims, in the order of the values.
        corpus: how many texts the units are held against.
        tokens: how many were encoded.
        started: `time.perf_counter()` when the work began.
    """
    main = next(iter(metrics))
    target_n = units.target()
    of_language = by_language(units.languages)
    weight_l = np.array([len(at_k) for at_k in of_language.values()]) / len(units.ids)
    points = {
        name: np.stack(
            [
                metric.builder(target_n[at_k], metric.value_nm[at_k])(np.ones((1, len(at_k))))[0]
                for at_k in of_language.values()
            ]
        )
        for name, metric in metrics.items()
    }
    samples_lrm = _samples(kind, target_n, metrics[main].value_nm, of_language)
    scores: Scores = {
        "kind": kind,
        "metric": main,
        "scores": {},
        "languages": {},
        "queries": len(units.ids),
        "corpus": corpus,
        "seconds": 0.0,
        "tokens": tokens,
        "types": {},
    }
    for m, dim in enumerate(dims):
        scores["scores"][str(dim)] = {
            **{name: _rounded(weight_l @ point_lm[:, m]) for name, point_lm in points.items()},
            "ci": _interval(np.tensordot(weight_l, samples_lrm[:, :, m], 1)),
            "macro": _rounded(points[main][:, m].mean()),
            "macro_ci": _interval(samples_lrm[:, :, m].mean(axis=0)),
        }
        scores["languages"][str(dim)] = {
            language: {
                "queries": len(at_k),
                **{name: _rounded(point_lm[place, m]) for name, point_lm in points.items()},
                "ci": _interval(samples_lrm[place, :, m]),
            }
            for place, (language, at_k) in enumerate(of_language.items())
        }
    scores["seconds"] = round(time.perf_counter() - started, 2)
    return Measured(scores, _table(units, metrics[main].value_nm, dims))


def compare(kind: Kind, a: Measured | pa.Table, b: Measured | pa.Table, dims: tuple[int, int]) -> Comparison:
    """Compares two models by the units that measuring one task gave for each; nothing is encoded.

    Args:
        kind: of the task.
        a: the one model's units.
        b: the other's.
        dims: the dim of each that is compared.

    Raises:
        ValueError: they are not the same units.
    """
    table_a, table_b = (found.units if isinstance(found, Measured) else found for found in (a, b))
    if not same_units(table_a, table_b):
        raise ValueError(f"compare: {len(table_a)} units against {len(table_b)}, and they are not the same ones")
    target_n = table_a["target"].to_numpy().astype(np.float64)
    value_n2 = np.column_stack(
        [table[str(dim)].to_numpy() for table, dim in zip((table_a, table_b), dims, strict=True)]
    )
    of_language = by_language(table_a["language"].to_pylist())
    point_l2 = np.stack(
        [MAIN[kind](target_n[at_k], value_n2[at_k])(np.ones((1, len(at_k))))[0] for at_k in of_language.values()]
    )
    samples_lr2 = _samples(kind, target_n, value_n2, of_language)
    weight_l = np.array([len(at_k) for at_k in of_language.values()]) / len(target_n)
    even_l = np.full(len(of_language), 1 / len(of_language))
    overall, macro = (
        _difference(share_l @ point_l2, np.tensordot(share_l, samples_lr2, 1)) for share_l in (weight_l, even_l)
    )
    languages = {
        language: _difference(point_l2[place], samples_lr2[place]) for place, language in enumerate(of_language)
    }
    return Comparison(overall, macro, languages)


def same_units(a: pa.Table, b: pa.Table) -> bool:
    """Whether the units of two measurements are the same ones, in the same order."""
    fixed = ["id", "language", "target"]
    return bool(a.select(fixed).equals(b.select(fixed)))


def _samples(kind: Kind, target_n: Values, value_nm: Values, of_language: Mapping[str, Positions]) -> Values:
    """The main metric of each language over its resamples [l, r, m]: the same ones for every model."""
    return np.stack(
        [
            bootstrap(MAIN[kind](target_n[at_k], value_nm[at_k]), len(at_k), language)
            for language, at_k in of_language.items()
        ]
    )


def by_language(languages: Sequence[str]) -> dict[str, Positions]:
    """Places of the units of each language, sorted by it."""
    names, of_n = np.unique(np.array(languages, dtype=np.str_), return_inverse=True)
    order_n = np.argsort(of_n, kind="stable")
    ends = np.cumsum(np.bincount(of_n, minlength=len(names)))
    return dict(zip(map(str, names), np.split(order_n, ends[:-1]), strict=True))


def _table(units: Units, value_nm: Values, dims: Sequence[int]) -> pa.Table:
    target = pa.nulls(len(units.ids), pa.float64()) if units.target_n is None else pa.array(units.target_n)
    return pa.table(
        {
            "id": pa.array(units.ids, pa.string()),
            "language": pa.array(units.languages, pa.string()),
            "target": target,
            **{str(dim): pa.array(value_n) for dim, value_n in zip(dims, value_nm.T, strict=True)},
        }
    )


def _difference(point_2: Values, sample_r2: Values) -> Difference:
    return difference(float(point_2[0]), float(point_2[1]), sample_r2[:, 0], sample_r2[:, 1])


def _interval(sample_r: Values) -> list[float]:
    return [_rounded(end) for end in interval(sample_r)]


def _rounded(value: float) -> float:
    return round(float(value), DIGITS)
