"""From the values of each unit of a task to scores with intervals.

Languages are scored by themselves and resampled by themselves: the score of all is the mean of theirs, weighted by
their units, and the macro score the plain mean. So a correlation or a clustering never mixes languages, and one
round of resamples serves the intervals of every language, of all and of the macro mean.

Shapes: n units, m dims, r resamples, l languages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa

from f2llm_ray.data.ragged import Ints
from f2llm_ray.evaluate.metrics.intervals import Values, bootstrap, interval
from f2llm_ray.evaluate.metrics.weighted_metrics import Builder, Metrics

DIGITS = 6
NO_DIM = 0
"""Stands for the dim of a ranking that comes from no vectors."""
FIXED = ["id", "language", "target"]
"""Columns of a table of units; the others are dims."""


class TaskScores(TypedDict):
    """What a model scores on a task, as JSON values; dims are strings."""

    kind: str
    """One of `registry.TASKS`."""
    metric: str
    """The main metric of this kind."""
    scores: dict[str, dict[str, Any]]
    """By dim: each metric; "ci", the 95 % interval [low, high] of the main one; "macro", the mean of the main
    metric over languages, each counting once, and "macro_ci". A metric is the mean of its values by language,
    weighted by their numbers of queries; where it is a mean over queries, that is the mean over all of them."""
    languages: dict[str, dict[str, dict[str, Any]]]
    """By dim and language: "queries", how many there are, each metric over them alone, and "ci"."""
    queries: int
    """How many are scored: queries, or the texts or pairs of a labelled set."""
    corpus: int
    """How many texts these are compared with: passages, translations, candidates or training texts; 0 for none."""
    tokens: int
    """Tokens encoded, each distinct text once."""
    types: dict[str, dict[str, float]]
    """By trained dim and type of vector: the main metric over some of the queries; only retrieval has it."""


class Measured(NamedTuple):
    """Scores, and what they are computed from."""

    scores: TaskScores
    units: pa.Table
    """One row per query, text or pair, in the task's order: `id`, `language`, `target` (null where the kind has
    none), and a column per dim, named by it, with the value of the main metric, or what it is computed from."""
    failures: Sequence[Mapping[str, Any]] = ()
    """Queries whose right passage is far down, as JSON values (`failures.Failure`); only retrieval has them."""


class LanguageGroups:
    """The units of each language, sorted by it."""

    def __init__(self, languages: Sequence[str]) -> None:
        self.places = by_language(languages)
        self.weight_l = np.array([len(at_k) for at_k in self.places.values()]) / len(languages)

    def scores(self, builder: Builder, target_n: Values, value_nm: Values) -> Values:
        """A metric of each language [l, m]."""
        return np.stack(
            [builder(target_n[at_k], value_nm[at_k])(np.ones((1, len(at_k))))[0] for at_k in self.places.values()]
        )

    def resampled(self, builder: Builder, target_n: Values, value_nm: Values) -> Values:
        """The same over resamples of the language [l, r, m], which are the same ones for every model."""
        return np.stack(
            [
                bootstrap(builder(target_n[at_k], value_nm[at_k]), len(at_k), language)
                for language, at_k in self.places.items()
            ]
        )


def measured(
    kind: str,
    metrics: Metrics,
    units: pa.Table,
    values: Mapping[int, Mapping[str, Values]],
    *,
    corpus: int,
    tokens: int,
) -> Measured:
    """Scores of a task.

    Args:
        kind: of the task.
        metrics: how each metric is computed, the main one first.
        units: what is scored, queries, texts or pairs of texts (`units_table`).
        values: by dim, largest first, and metric: the value of each unit [n].
        corpus: how many texts the units are compared with.
        tokens: how many were encoded.
    """
    main = next(iter(metrics))
    target_n = units["target"].to_numpy().astype(np.float64)
    value_nm = {name: np.column_stack([found[name] for found in values.values()]) for name in metrics}
    groups = LanguageGroups(units["language"].to_pylist())
    points = {name: groups.scores(builder, target_n, value_nm[name]) for name, builder in metrics.items()}
    samples_lrm = groups.resampled(metrics[main], target_n, value_nm[main])
    scores: TaskScores = {
        "kind": kind,
        "metric": main,
        "scores": {},
        "languages": {},
        "queries": len(units),
        "corpus": corpus,
        "tokens": tokens,
        "types": {},
    }
    for m, dim in enumerate(values):
        scores["scores"][str(dim)] = {
            **{name: rounded(groups.weight_l @ point_lm[:, m]) for name, point_lm in points.items()},
            "ci": _interval(np.tensordot(groups.weight_l, samples_lrm[:, :, m], 1)),
            "macro": rounded(points[main][:, m].mean()),
            "macro_ci": _interval(samples_lrm[:, :, m].mean(axis=0)),
        }
        scores["languages"][str(dim)] = {
            language: {
                "queries": len(at_k),
                **{name: rounded(point_lm[place, m]) for name, point_lm in points.items()},
                "ci": _interval(samples_lrm[place, :, m]),
            }
            for place, (language, at_k) in enumerate(groups.places.items())
        }
    for dim, value_n in zip(values, value_nm[main].T, strict=True):
        units = units.append_column(str(dim), pa.array(value_n))
    return Measured(scores, units)


def units_table(ids: Sequence[str], languages: Sequence[str], target_n: Values | None = None) -> pa.Table:
    """What is scored, a row each; targets are what the values are compared with: grades, labels or classes."""
    target = pa.nulls(len(ids), pa.float64()) if target_n is None else pa.array(target_n)
    return pa.table([pa.array(ids, pa.string()), pa.array(languages, pa.string()), target], FIXED)


def dims_of(units: pa.Table) -> list[int]:
    """The dims that a model was measured at, largest first."""
    return sorted((int(name) for name in units.column_names if name not in FIXED), reverse=True)


def columns(units: pa.Table, dims: Sequence[int]) -> tuple[Values, Values]:
    """The targets [n], NaN where there are none, and the values at dims [n, m] of a table of units."""
    values = [units[str(dim)].to_numpy() for dim in dims]
    return units["target"].to_numpy().astype(np.float64), np.column_stack(values)


def same_units(a: pa.Table, b: pa.Table) -> bool:
    """Whether the units of two measurements are the same ones, in the same order."""
    return bool(a.select(FIXED).equals(b.select(FIXED)))


def by_language(languages: Sequence[str]) -> dict[str, Ints]:
    """Places of the units of each language, sorted by it."""
    names, of_n = np.unique(np.array(languages, dtype=np.str_), return_inverse=True)
    order_n = np.argsort(of_n, kind="stable")
    ends = np.cumsum(np.bincount(of_n, minlength=len(names)))
    return dict(zip(map(str, names), np.split(order_n, ends[:-1]), strict=True))


def rounded(value: Any) -> float:
    """A score with the digits that a report keeps."""
    return round(float(value), DIGITS)


def _interval(sample_r: Values) -> list[float]:
    return [rounded(end) for end in interval(sample_r)]
