"""Where the served model stands on each set between chance, BM25, its backbone and the baselines, in sentences.

The report's `standing` has the differences, each with its 95 % interval; a model is above or below another one
where that leaves out 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from f2llm_ray.base import formatting
from f2llm_ray.report.read_scores import (
    FEW,
    ModelEntry,
    RunReport,
    at_full,
    by_dim,
    main_metric,
    served_of,
    sets_of,
)

Standing = Mapping[str, Any]
"""One row of the report's `standing`."""


def standing_sentences(report: RunReport) -> list[str]:
    """One sentence for each set on which the served model can be held against something."""
    served = served_of(report)
    if served is None:
        return []
    found = [_sentence(report, served, name) for name in sets_of([served])]
    return [sentence for sentence in found if sentence]


def rows_on(report: RunReport, name: str) -> list[Standing]:
    """What the served model is held against on a set: what it is below first, what it is above last."""
    rows = [row for row in report.get("standing") or [] if row["set"] == name]
    return sorted(rows, key=lambda row: _side(report, row))


def below(report: RunReport, kind: str) -> list[str]:
    """The sets on which the served model is surely below what is of a kind, such as "bm25"."""
    rows = report.get("standing") or []
    return list(dict.fromkeys(row["set"] for row in rows if row["kind"] == kind and _side(report, row) < 0))


def is_behind(report: RunReport, name: str, model: ModelEntry | None) -> bool:
    """Whether nothing good can be said of a model on a set: BM25 or the backbone has more."""
    score = None if model is None else at_full(model, name)
    theirs = [_score_of(report, row) for row in rows_on(report, name) if row["kind"] in ("bm25", "backbone")]
    return score is not None and any(other is not None and other > score for other in theirs)


def _sentence(report: RunReport, served: ModelEntry, name: str) -> str:
    rows, chance = rows_on(report, name), (report.get("chance") or {}).get(name)
    if not rows and chance is None:
        return ""
    score = f"{main_metric([served], name)} {formatting.score(at_full(served, name))}"
    parts = [_verdict(report, row) for row in rows]
    if chance is not None:
        facts = next(iter(by_dim(served, name).values()), {})
        above = (facts.get("ci") or [1.0])[0] > chance
        parts.append(f"{'above' if above else 'not clearly above'} chance ({formatting.score(chance)})")
    return f"On {name} the served model {served.get('name')} has {score}: {formatting.listed(parts)}."


def _side(report: RunReport, row: Standing) -> int:
    """-1 where the served model is surely below, 1 where it is surely above, else 0."""
    queries = ((report.get("sets") or {}).get(row["set"]) or {}).get("queries", FEW)
    if queries < FEW:
        return 0
    return -1 if row["high"] < 0 else int(row["low"] > 0)


def _verdict(report: RunReport, row: Standing) -> str:
    side, who = _side(report, row), {"bm25": "BM25", "backbone": "its backbone"}.get(row["kind"], row["against"])
    score = formatting.score(_score_of(report, row))
    if not side:
        gap = f"difference {row['difference']:+.3f}, 95 % interval {row['low']:+.3f} to {row['high']:+.3f}"
        return f"neither surely above nor below {who} ({score}; {gap})"
    low, high = sorted((abs(row["low"]), abs(row["high"])))
    return (
        f"{'above' if side > 0 else 'below'} {who} ({score}) by {abs(row['difference']):.3f} "
        f"(95 % interval {low:.3f} to {high:.3f})"
    )


def _score_of(report: RunReport, row: Standing) -> float | None:
    """The score of what the served model is held against."""
    known = [*(report.get("baselines") or []), *(report.get("models") or [])]
    return next((at_full(entry, row["set"]) for entry in known if entry.get("name") == row["against"]), None)
