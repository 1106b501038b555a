"""Reading the scores in a report: which sets, which metrics, at which dim. Any part may be missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from f2llm_ray.base import formatting

Model = Mapping[str, Any]
Facts = Mapping[str, Any]

BESIDE = ("queries", "ci", "macro", "macro_ci")
"""What stands among the metrics without being one."""
FEW = 10
"""Queries of a language below which its score says little, and its interval is too narrow to be shown."""

BITS = {"float": 32, "int8": 8, "binary": 1}
"""Of a dim, by type of vector."""


def megabytes(dim: int, kind: str) -> int:
    """Megabytes of a million vectors."""
    return -(-dim * BITS[kind] // 8)


def reference_of(report: Mapping[str, Any]) -> Model | None:
    """The model that the pruned one and those made from it are held against; None before there are both."""
    models = report.get("models") or []
    wanted = report.get("reference") if shrunk_of(models) else None
    return next((model for model in models if model.get("name") == wanted), None)


def shrunk_of(models: Sequence[Model]) -> Sequence[Model]:
    """The pruned model and those made from it."""
    names = [model.get("name") for model in models]
    return models[names.index("pruned") :] if "pruned" in names else []


def enough(languages: Mapping[str, Facts]) -> dict[str, Facts]:
    """The languages whose scores say something: those of `FEW` queries or more."""
    return {language: facts for language, facts in languages.items() if facts.get("queries", FEW) >= FEW}


def sets_of(models: Iterable[Model]) -> list[str]:
    """The names of the sets that any of the models was measured on."""
    return list(dict.fromkeys(name for model in models for name in model.get("scores") or {}))


def by_dim(model: Model, name: str) -> dict[int, Facts]:
    """A model's scores on a set, largest dim first."""
    scores = (model.get("scores") or {}).get(name) or {}
    return {int(dim): scores[dim] for dim in sorted(scores, key=int, reverse=True)}


def by_language(model: Model, name: str) -> Mapping[str, Facts]:
    """A model's scores at its full dim by language."""
    found = (model.get("languages") or {}).get(name) or {}
    return found[max(found, key=int)] or {} if found else {}


def metrics_of(models: Iterable[Model], name: str) -> list[str]:
    """The metrics of a set, the main one first."""
    full = (scores for model in models for scores in by_dim(model, name).values())
    return [metric for metric in next(full, {}) if metric not in BESIDE]


def main_metric(models: Iterable[Model], name: str) -> str:
    """The main metric of a set, "score" where nothing was measured."""
    return next(iter(metrics_of(models, name)), "score")


def at_full(model: Model, name: str, metric: str | None = None) -> float | None:
    """A metric of a set at the largest dim; the main one by default."""
    scores = next(iter(by_dim(model, name).values()), {})
    return scores.get(metric or main_metric([model], name))


def interval(facts: Facts) -> str:
    """The 95 % interval of the main metric; nothing where it was not measured, or is too narrow to be one."""
    ends = facts.get("ci")
    if ends is None or ends[0] == ends[1] or facts.get("queries", FEW) < FEW:
        return ""
    return f"{formatting.score(ends[0])} to {formatting.score(ends[1])}"
