"""The models of a report as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from f2llm_ray.base import formatting
from f2llm_ray.report.advice import advice
from f2llm_ray.report.page import Cells
from f2llm_ray.report.read_scores import (
    ModelEntry,
    RunReport,
    by_dim,
    layer_tables,
    metrics_of,
    mixed_sentences,
    sets_of,
    shown,
)
from f2llm_ray.report.standing import standing_sentences

TERMINAL_COLUMNS = 120


def terminal_table(report: RunReport) -> str:
    """One row per baseline and model: sizes, and for each set the metrics at d and the main one at smaller dims.

    Below them stands in sentences where the served model is between chance, BM25 and the baselines, what the
    queries of models that end in their teacher's space find among its passages, and the first line of what the
    report says to try next.
    Sets are side by side as long as they fit in `TERMINAL_COLUMNS`; the others follow below.
    """
    if not report.get("models"):
        return f"models: {formatting.NOT_MEASURED}"
    models, standing = shown(report), [*standing_sentences(report), *mixed_sentences(report)]
    sizes = [["params", *(formatting.size(model.get("parameters")) for model in models)]]
    sizes.append(["non-emb", *(formatting.size(model.get("non_embedding_parameters")) for model in models)])
    names = [["model", *(formatting.clip(str(model.get("name")), 16) for model in models)]]
    left = _beside([_aligned(names, left=True), _aligned(sizes)], gap=2)
    width = len(left[0])
    lines: list[str] = []
    block, titles = left, " " * width
    for name in sets_of(models):
        part = _aligned(_terminal_columns(models, name))
        if len(block[0]) + 3 + len(part[0]) > TERMINAL_COLUMNS and block is not left:
            lines += [titles.rstrip(), *block, ""]
            block, titles = left, " " * width
        block = _beside([block, part], gap=3)
        titles += "   " + formatting.clip(name, len(part[0])).ljust(len(part[0]))
    title = [titles.rstrip()] if titles.strip() else []
    below = [*_by_layers(models), *(["", *standing] if standing else [])]
    below += [f"What to try next: {line}" for line in advice(report)[:1]]
    return "\n".join(line.rstrip() for line in [*lines, *title, *block, *below])


def _by_layers(models: Sequence[ModelEntry]) -> list[str]:
    """For each model with exits and each set, a table of the main metric by layers and dims."""
    lines = []
    for model in models:
        for name, metric, cells in layer_tables(model):
            lines += ["", f"{model.get('name')} on {name}: {metric} by layers and dims"]
            lines += _aligned([list(column) for column in zip(*cells, strict=True)])
    return lines


def _terminal_columns(models: Sequence[ModelEntry], name: str) -> Cells:
    """Columns, each with its header: the metrics at d, then the main one at d over each divisor."""
    found = [by_dim(model, name) for model in models]
    # A ranking without vectors has its one score in the column of the full dim.
    cells = [{max(scores) // (dim or 1) or 1: facts for dim, facts in scores.items()} for scores in found]
    divisors = sorted({divisor for cell in cells for divisor in cell} - {1})
    metrics = metrics_of(models, name)
    columns = [[metric, *(_brief(cell.get(1), metric) for cell in cells)] for metric in metrics]
    smaller = [[f"d/{n}", *(_brief(cell.get(n), metrics[0]) for cell in cells)] for n in divisors]
    return columns + smaller


def _brief(scores: Mapping[str, Any] | None, metric: str) -> str:
    value = (scores or {}).get(metric)
    return "-" if value is None else f"{value:.3f}"


def _aligned(columns: Cells, *, left: bool = False) -> list[str]:
    """Lines of equal width, numbers to the right."""
    widths = [max(map(len, column)) for column in columns]
    return [
        " ".join(cell.ljust(width) if left else cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in zip(*columns, strict=True)
    ]


def _beside(blocks: Sequence[Sequence[str]], gap: int) -> list[str]:
    return [(" " * gap).join(parts) for parts in zip(*blocks, strict=True)]
