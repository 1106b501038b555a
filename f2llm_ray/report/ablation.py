"""The table of an ablation: rows from the reports of variants, as JSON, Markdown and a page with a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from f2llm_ray.base import formatting
from f2llm_ray.report.page import render_page
from f2llm_ray.report.plots import Plot, line_plot
from f2llm_ray.report.read_scores import lineage
from f2llm_ray.run.folder import Folder

METRIC = "ndcg@10"
PER_PLOT = 5
"""Lines of one plot, each of its own colour."""

AblationRow = dict[str, Any]


def rows_of(results: Mapping[str, Mapping[str, Any]], reference: str | None) -> list[AblationRow]:
    """One row for the reference model, where it is known, and one per variant.

    A variant is judged by the last model it makes, at its full dim and at the shorter ones.

    Args:
        results: `models` and `training` of each variant's report, and by set how far its last model is from the
            first variant's (`against_first`, with `low` and `high`); or its `error`.
        reference: name of the model that is compared with.

    Returns:
        Rows with `name`, `model`, `parameters`, `non_embedding_parameters`, `steps`, `tokens`, `scores` (by set,
        at the full dim), `mean` (over the sets), `by_dim` (the mean by dim), `kept`, the share of the
        reference's mean, and `against_first`; or `name` and `error`.
    """
    rows: list[AblationRow] = []
    for result in results.values():
        found = [model for model in result.get("models", ()) if model["name"] == reference]
        if found:
            rows.append(_row(f"reference: {reference}", found[0], result["training"].get(reference)))
            break
    whole = rows[0]["mean"] if rows else None
    for name, result in results.items():
        if "error" in result:
            rows.append({"name": name, "error": result["error"]})
            continue
        last = result["models"][-1]
        # A model that was merged or quantized has the training of the one it is made from; a pruned one has none.
        made = (model for model in lineage(result["models"], last) if model.get("kind") not in {"merge", "int8"})
        row = _row(name, last, result["training"].get(next(made, last)["name"]))
        rows.append({**row, "against_first": result["against_first"]})
    for row in rows:
        if "mean" in row:
            row["kept"] = row["mean"] / whole if whole and row["mean"] is not None else None
    return rows


def write_ablation(out: Folder, ablation: Mapping[str, Any]) -> None:
    """Writes ablation.json, ablation.md and ablation.html."""
    out.write_json("ablation.json", dict(ablation))
    out.write_bytes("ablation.md", markdown(ablation["rows"]).encode())
    out.write_bytes("ablation.html", page(ablation).encode())


def markdown(rows: Sequence[AblationRow]) -> str:
    """The table as Markdown."""
    head, *body = cells(rows)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(_escaped(cell) for cell in line)} |\n" for line in (head, rule, *body))


def cells(rows: Sequence[AblationRow]) -> list[list[str]]:
    """The table's head and its lines."""
    sets = list(dict.fromkeys(name for row in rows for name in row.get("scores", {})))
    scores = [f"{METRIC} {name}" for name in sets]
    head = ["variant", "outside embeddings", "steps", "tokens", *scores, "mean", "kept"]
    body = []
    for row in rows:
        if "error" in row:
            body.append([row["name"], *[""] * (len(head) - 2), row["error"]])
            continue
        body.append(
            [
                row["name"],
                formatting.count(row["non_embedding_parameters"]),
                formatting.count(row["steps"]),
                formatting.count(row["tokens"]),
                *(formatting.score(row["scores"].get(name)) + _sure(row, name) for name in sets),
                formatting.score(row["mean"]),
                formatting.NOT_MEASURED if row["kept"] is None else f"{100 * row['kept']:.1f} %",
            ]
        )
    return [head, *body]


def page(ablation: Mapping[str, Any]) -> str:
    """The HTML page; all text in it is escaped."""
    measured = [row for row in ablation["rows"] if row.get("by_dim")]
    groups = [measured[first : first + PER_PLOT] for first in range(0, len(measured), PER_PLOT)]
    head, *body = cells(ablation["rows"])
    return render_page(
        "ablation.html",
        name=ablation["name"],
        facts=[ablation["created"], ablation["device"]],
        headline=_headline(ablation["rows"]),
        head=head,
        rows=body,
        plots=[_plot(f"dims-{number}", group) for number, group in enumerate(groups)],
        changes=[(name, str(change or "none")) for name, change in ablation["changes"].items()],
    )


def _row(name: str, model: Mapping[str, Any], training: Mapping[str, Any] | None) -> AblationRow:
    # Sets of other tasks have other metrics; what is compared is retrieval.
    by_set = {
        found: {int(dim): float(values[METRIC]) for dim, values in scores.items() if METRIC in values}
        for found, scores in model["scores"].items()
    }
    by_set = {found: scores for found, scores in by_set.items() if scores}
    full = {found: scores[max(scores)] for found, scores in by_set.items()}
    dims = sorted({dim for scores in by_set.values() for dim in scores})
    return {
        "name": name,
        "model": model["name"],
        "parameters": model["parameters"],
        "non_embedding_parameters": model["non_embedding_parameters"],
        "steps": None if training is None else training["steps"],
        "tokens": None if training is None else training["tokens"],
        "scores": full,
        "mean": _mean(list(full.values())),
        "by_dim": {str(dim): _mean([scores[dim] for scores in by_set.values() if dim in scores]) for dim in dims},
        "against_first": {},
    }


def _sure(row: AblationRow, name: str) -> str:
    """A sign after a score whose difference from the first variant's has a 95 % interval without 0."""
    gap = row["against_first"].get(name)
    if gap is None or gap["low"] <= 0 <= gap["high"]:
        return ""
    return " ▲" if gap["low"] > 0 else " ▼"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _headline(rows: Sequence[AblationRow]) -> list[str]:
    ranked = sorted((row for row in rows if row.get("mean") is not None), key=lambda row: -row["mean"])
    ranked = [row for row in ranked if not row["name"].startswith("reference: ")]
    if not ranked:
        return []
    best = ranked[0]
    kept = "" if best["kept"] is None else f", {100 * best['kept']:.1f} % of the reference"
    return [
        f"Best of {formatting.plural(len(ranked), 'variant')}: {best['name']}, {METRIC} {best['mean']:.3f}{kept}."
    ]


def _plot(name: str, rows: Sequence[AblationRow]) -> Plot:
    lines = {row["name"]: [(float(dim), mean) for dim, mean in row["by_dim"].items()] for row in rows}
    ticks = sorted({int(dim) for row in rows for dim in row["by_dim"]})
    return line_plot(name, lines, x="dims", y=METRIC, markers=True, ticks=ticks)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
