"""Reading the scores in a report: which sets, which metrics, at which dim. Any part may be missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from f2llm_ray.base import formatting
from f2llm_ray.evaluate.metrics.scores import NO_DIM
from f2llm_ray.report.page import Cells

RunReport = Mapping[str, Any]
"""What report.json holds."""
ModelEntry = Mapping[str, Any]
"""One of the report's `models`."""
Metrics = Mapping[str, Any]
"""Scores by metric, and the keys in `BESIDE`."""

BESIDE = ("queries", "ci", "macro", "macro_ci")
"""Keys among the metrics that are not metrics."""
FEW = 10
"""Queries of a language below which its score says little, and its interval is too narrow to be shown."""

BITS = {"float": 32, "int8": 8, "binary": 1}
"""Of a dim, by type of vector."""


def megabytes(dim: int, kind: str) -> int:
    """Megabytes of a million vectors."""
    return -(-dim * BITS[kind] // 8)


def lineage(models: Sequence[ModelEntry], model: ModelEntry) -> list[ModelEntry]:
    """A model and those that it was made from, the nearest first."""
    by_name = {found["name"]: found for found in models if found.get("name")}
    found = [model]
    while len(found) < len(models) and found[-1].get("made_from") in by_name:
        found.append(by_name[found[-1]["made_from"]])
    return found


def is_shrunk(models: Sequence[ModelEntry], model: ModelEntry) -> bool:
    """Whether a model was pruned or made from a pruned one."""
    return any(found.get("kind") == "prune" for found in lineage(models, model))


def reference_of(report: RunReport) -> ModelEntry | None:
    """The model that pruned models, and those made from them, are compared with; None before there are both."""
    models = report.get("models") or []
    wanted = report.get("reference") if any(is_shrunk(models, model) for model in models) else None
    return next((model for model in models if model.get("name") == wanted), None)


def served_of(report: RunReport) -> ModelEntry | None:
    """The model that the run serves, the last one where it names none; None without models."""
    models = report.get("models") or []
    wanted = (report.get("serving") or {}).get("model")
    return next((model for model in models if model.get("name") == wanted), models[-1] if models else None)


def shown(report: RunReport) -> list[ModelEntry]:
    """What the tables of scores show: BM25 and the baselines, then the run's models."""
    return [*(report.get("baselines") or []), *(report.get("models") or [])]


def dim_cell(dim: int | None) -> str:
    """A dim in a table; a ranking without vectors has none."""
    return "–" if dim == NO_DIM else formatting.count(dim)


def enough(languages: Mapping[str, Metrics]) -> dict[str, Metrics]:
    """The languages with `FEW` queries or more."""
    return {language: facts for language, facts in languages.items() if facts.get("queries", FEW) >= FEW}


def sets_of(models: Iterable[ModelEntry]) -> list[str]:
    """The names of the sets that any of the models was measured on."""
    return list(dict.fromkeys(name for model in models for name in model.get("scores") or {}))


def by_dim(model: ModelEntry, name: str) -> dict[int, Metrics]:
    """A model's scores on a set, largest dim first."""
    scores = (model.get("scores") or {}).get(name) or {}
    return {int(dim): scores[dim] for dim in sorted(scores, key=int, reverse=True)}


def layer_cells(model: ModelEntry, name: str) -> Cells:
    """The main metric of a set by layers and dims: a row of headings, then one for each exit and the whole model.

    Nothing where no exit of the model was measured on the set.
    """
    exits = {
        int(layers): by_dim({"scores": scores}, name) for layers, scores in (model.get("exits") or {}).items()
    }
    found = {layers: exits[layers] for layers in sorted(exits) if exits[layers]}
    if not found:
        return []
    found |= {int(model["layers"]): by_dim(model, name)} if by_dim(model, name) else {}
    main, dims = main_metric([model], name), sorted({dim for of in found.values() for dim in of}, reverse=True)
    rows = [
        [str(layers), *(formatting.score((of.get(dim) or {}).get(main)) for dim in dims)]
        for layers, of in found.items()
    ]
    return [["layers", *(f"{formatting.count(dim)} dims" for dim in dims)], *rows]


def layer_tables(model: ModelEntry) -> list[tuple[str, str, Cells]]:
    """Of each set that exits of a model were measured on: its name, the main metric, and `layer_cells`."""
    found = ((name, layer_cells(model, name)) for name in sets_of([model]))
    return [(name, main_metric([model], name), cells) for name, cells in found if cells]


def by_language(model: ModelEntry, name: str) -> Mapping[str, Metrics]:
    """A model's scores at its full dim by language."""
    found = (model.get("languages") or {}).get(name) or {}
    return found[max(found, key=int)] or {} if found else {}


def metrics_of(models: Iterable[ModelEntry], name: str) -> list[str]:
    """The metrics of a set, the main one first; "score" alone where nothing was measured."""
    full = (scores for model in models for scores in by_dim(model, name).values())
    return [metric for metric in next(full, {}) if metric not in BESIDE] or ["score"]


def main_metric(models: Iterable[ModelEntry], name: str) -> str:
    """The main metric of a set."""
    return metrics_of(models, name)[0]


def mixed_entry(model: ModelEntry, whose: str = "") -> ModelEntry | None:
    """What is shown of a model's queries against its teacher's passages; None where that was not measured.

    Args:
        model: its entry.
        whose: what the model is called; "queries of NAME" when unset.
    """
    mixed = model.get("mixed")
    if not mixed:
        return None
    asked = whose or f"queries of {model.get('name')}"
    return {"name": f"{asked}, passages of {mixed['teacher']}", "scores": mixed["scores"]}


def mixed_sentences(report: RunReport) -> list[str]:
    """One sentence for each model whose queries were measured against its teacher's passages."""
    entries = [entry for model in report.get("models") or [] if (entry := mixed_entry(model)) is not None]
    found = []
    for entry in entries:
        names = sets_of([entry])
        scores = [f"{formatting.score(at_full(entry, name))} on {name}" for name in names]
        found.append(f"{entry['name']}: {main_metric([entry], names[0])} {formatting.listed(scores)}.")
    return found


def at_full(model: ModelEntry, name: str) -> float | None:
    """The main metric of a set at the largest dim."""
    return next(iter(by_dim(model, name).values()), {}).get(main_metric([model], name))


def source_cells(sources: Mapping[str, Mapping[str, Any]]) -> Cells:
    """Rows of source, task, training rows and licence."""
    return [
        [
            name,
            str(facts.get("task") or ""),
            formatting.count(facts.get("rows")),
            str(facts.get("licence") or "not stated"),
        ]
        for name, facts in sources.items()
    ]


def interval(facts: Metrics) -> str:
    """The 95 % interval of the main metric; nothing where it was not measured, or is too narrow to be one."""
    ends = facts.get("ci")
    if ends is None or ends[0] == ends[1] or facts.get("queries", FEW) < FEW:
        return ""
    return f"{formatting.score(ends[0])} to {formatting.score(ends[1])}"
