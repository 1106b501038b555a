"""The report of a run: JSON, one HTML page that needs nothing else, and model cards.

The report's dict may lack any part: a run that has not measured something says so in that place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from f2llm_ray.base import formatting
from f2llm_ray.report.advice import advice, cut_sentence
from f2llm_ray.report.headline import headline
from f2llm_ray.report.languages import named
from f2llm_ray.report.model_card import write_cards
from f2llm_ray.report.page import Cells, render_page
from f2llm_ray.report.read_scores import (
    BITS,
    Metrics,
    ModelEntry,
    RunReport,
    at_full,
    by_dim,
    by_language,
    dim_cell,
    enough,
    interval,
    is_shrunk,
    layer_tables,
    main_metric,
    megabytes,
    metrics_of,
    mixed_entry,
    reference_of,
    served_of,
    sets_of,
    source_cells,
)
from f2llm_ray.report.report_plots import LANGUAGES_PLOTTED, Plots, plots_of
from f2llm_ray.report.resources import by_resources
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.root import REPORT

LANGUAGES_OPEN = 20
"""Rows of the per-language table that are shown before unfolding it."""
FAILURES_OPEN = 12
"""The same for queries that the model fails on."""
TYPES_OPEN = 9
"""The same for the table of smaller vectors: three dims."""


def write_report(root: Folder, report: dict[str, Any]) -> None:
    """Writes report.json, report.html and plots/ into the run's root, and a card into the folder of each model."""
    plots = plots_of(report)
    root.write_json(REPORT, report)
    root.write_bytes("report.html", render(report, plots).encode("utf-8"))
    (root / "plots").clear()
    for plot in plots.all():
        (root / "plots").write_bytes(plot.file, plot.png())
    write_cards(root, report)


def render(report: RunReport, plots: Plots) -> str:
    """The HTML page; all text in it is escaped."""
    models, served = list(report.get("models") or []), served_of(report)
    beside = list(report.get("baselines") or [])
    reference, of_served = reference_of(report), [] if served is None else [served]
    against = [] if reference is None else [f"of {reference.get('name')}"]
    timed = any(model.get("query_ms") is not None for model in models)
    return render_page(
        "report.html",
        name=report.get("name") or "run",
        facts=[str(report[key]) for key in ("created", "device", "root") if report.get(key)],
        headline=headline(report),
        quality=[
            (name, _asked(report, name), _overlap(report, name), *_quality(report, reference, name))
            for name in sets_of(models)
        ],
        advice=advice(report),
        failures=[(name, _failures(found)) for name, found in (report.get("failures") or {}).items()],
        open_failures=FAILURES_OPEN,
        matryoshka=plots.matryoshka,
        layers=[
            (f"{model.get('name')} on {name}: {metric}", cells)
            for model in models
            for name, metric, cells in layer_tables(model)
        ],
        types=[entry for model in of_served for entry in _types(model)],
        type_plots=dict(plots.types),
        sizes=[_sizes(model, timed=timed) for model in models],
        served="" if served is None else str(served.get("name")),
        timed=timed,
        against=against,
        languages=[
            (
                name,
                [*_scores_head(models, name), *(str(entry["name"]) for entry in _on(beside, name))],
                _languages(model, report, reference, name),
            )
            for model in of_served
            for name in sets_of([model])
        ],
        resources=[
            (name, main_metric(models, name), _resources(model, report, reference, name))
            for model in of_served
            for name in sets_of([model])
        ],
        missing=[str(stage) for stage in report.get("missing") or []],
        open_rows=LANGUAGES_OPEN,
        open_types=TYPES_OPEN,
        plotted=LANGUAGES_PLOTTED,
        steps=[_step(row) for row in report.get("rows") or []],
        sources=source_cells(report.get("sources") or {}),
        cut=cut_sentence(report),
        language_count=len(report.get("languages") or {}),
        language_plot=plots.languages,
        training=[_training(*item) for item in (report.get("training") or {}).items()],
        loss_plots=plots.losses,
        score_plots=plots.scores,
        seconds=_seconds(report),
        serving=[(key, str(value)) for key, value in (report.get("serving") or {}).items()],
        commands=list((report.get("commands") or {}).items()),
        libraries=" · ".join(f"{key} {value}" for key, value in (report.get("libraries") or {}).items()),
    )


# The parts of the page


def _asked(report: RunReport, name: str) -> str:
    """The kind of a set, and how many queries it has and texts that they are compared with."""
    facts = (report.get("sets") or {}).get(name)
    if not facts:
        return ""
    among = f" among {formatting.count(facts['corpus'])}" if facts["corpus"] else ""
    return f"{str(facts['kind']).replace('_', ' ')}, {formatting.count(facts['queries'])} asked{among}"


def _scores_head(models: Sequence[ModelEntry], name: str) -> list[str]:
    """The metrics of a set as a table shows them: the main one with its interval, then the others."""
    main, *others = metrics_of(models, name)
    return [main, "95 % interval", *others]


def _scores_cells(models: Sequence[ModelEntry], name: str, facts: Metrics) -> list[str]:
    main, *others = (formatting.score(facts.get(metric)) for metric in metrics_of(models, name))
    return [main, interval(facts), *others]


def _overlap(report: RunReport, name: str) -> str:
    """How much of a set was trained on, where the training rows were not screened for it."""
    facts = (report.get("overlap") or {}).get(name)
    if facts is None:
        return ""
    rows, queries, of = (formatting.count(facts.get(key)) for key in ("rows", "queries", "of"))
    models = report.get("models") or []
    found = f"{rows} training rows hold a text of it, {queries} of {of} queries"
    if _clean(models, name):
        found += f"; the clean part's {main_metric(models, name)} is in the column clean"
    return f"The training rows are not screened for it: {found}."


def _clean(models: Sequence[ModelEntry], name: str) -> list[Mapping[str, float]]:
    """By model, the scores by dim on the part of a set that was not trained on; [] where no model has any."""
    found = [(model.get("clean") or {}).get(name) or {} for model in models]
    return found if any(found) else []


def _on(entries: Iterable[ModelEntry], name: str) -> list[ModelEntry]:
    """Those that were scored on a set."""
    return [entry for entry in entries if by_dim(entry, name)]


def _quality(report: RunReport, reference: ModelEntry | None, name: str) -> tuple[list[str], Cells]:
    """Names of the columns, and rows of model, d, metrics at d, and the main one's share of the reference's.

    BM25 and the baselines come first.
    """
    models = list(report.get("models") or [])
    clean, rows = _clean(models, name), []

    def beside(entries: Iterable[ModelEntry]) -> None:
        for entry in _on(entries, name):
            full, scores = next(iter(by_dim(entry, name).items()))
            row = [str(entry.get("name")), dim_cell(full), *_scores_cells(models, name, scores)]
            rows.append([*row, *([""] if clean else []), *([] if reference is None else [""])])

    beside(report.get("baselines") or [])
    for place, model in enumerate(models):
        dim, facts = next(iter(by_dim(model, name).items()), (None, {}))
        row = [str(model.get("name")), formatting.count(dim), *_scores_cells(models, name, facts)]
        if clean:
            row.append(formatting.score(clean[place].get(str(dim))))
        if reference is not None:
            share = formatting.share(at_full(model, name), at_full(reference, name))
            row.append(share if is_shrunk(models, model) else "")
        rows.append(row)
        beside(filter(None, [mixed_entry(model)]))
    return [*_scores_head(models, name), *(["clean"] if clean else [])], rows


def _types(model: ModelEntry) -> list[tuple[str, Cells]]:
    """By set, a row per dim and type: the score, and megabytes of a million vectors."""
    return [
        (
            name,
            [
                [
                    formatting.count(dim),
                    kind,
                    formatting.score(found[str(dim)].get(kind)),
                    formatting.count(megabytes(dim, kind)),
                ]
                for dim in sorted(map(int, found), reverse=True)
                for kind in BITS
            ],
        )
        for name, found in (model.get("types") or {}).items()
    ]


def _sizes(model: ModelEntry, *, timed: bool) -> list[str]:
    numbers = [formatting.count(model.get(key)) for key in ("parameters", "non_embedding_parameters")]
    return [
        str(model.get("name")),
        *numbers,
        formatting.byte_size(model.get("bytes")),
        *([formatting.milliseconds(model.get("query_ms"))] if timed else []),
        str(model.get("folder") or ""),
    ]


def _languages(model: ModelEntry, report: RunReport, reference: ModelEntry | None, name: str) -> Cells:
    """Rows of language, training rows, queries, and the metrics at d.

    After them come the main metric of BM25 and the baselines, and its share of the reference's.
    """
    trained = report.get("languages") or {}
    found, main = by_language(model, name), main_metric([model], name)
    theirs = {} if reference is None else by_language(reference, name)
    beside = [by_language(entry, name) for entry in _on(report.get("baselines") or [], name)]
    rows = []
    for language in sorted(found, key=lambda language: (found[language].get(main) or 0.0, language)):
        facts = found[language]
        counts = [formatting.count(trained.get(language, 0)), formatting.count(facts.get("queries"))]
        others = [formatting.score((scores.get(language) or {}).get(main)) for scores in beside]
        row = [named(language), *counts, *_scores_cells([model], name, facts), *others]
        if reference is not None:
            row.append(formatting.share(facts.get(main), (theirs.get(language) or {}).get(main)))
        rows.append(row)
    return rows


def _resources(model: ModelEntry, report: RunReport, reference: ModelEntry | None, name: str) -> Cells:
    """Rows of class, languages, training rows of each, the mean score, and that as a share of the reference's."""
    trained, main = report.get("languages") or {}, main_metric([model], name)
    theirs = {} if reference is None else by_language(reference, name)
    rows = []
    scores = enough(by_language(model, name))
    for group in by_resources(scores, trained):
        mean = group.mean(scores, main)
        row = [group.name, str(len(group.languages)), group.rows(trained), formatting.score(mean)]
        if reference is not None:
            row.append(formatting.share(mean, group.mean(theirs, main)))
        rows.append(row)
    return rows


def _failures(found: Sequence[Mapping[str, Any]]) -> Cells:
    """Rows of language, query, the right passage, its rank, and what was found first."""
    return [
        [
            named(entry["language"]),
            entry["query"],
            entry["expected"],
            formatting.count(entry["rank"]),
            entry["found"],
        ]
        for entry in found
    ]


def _step(row: Mapping[str, Any]) -> list[str]:
    dropped = formatting.tallied(row.get("dropped") or {})
    return [str(row.get("step")), formatting.count(row.get("in")), formatting.count(row.get("out")), dropped]


def _training(stage: str, facts: Mapping[str, Any]) -> list[str]:
    speed = facts.get("tokens_per_second")
    return [
        stage,
        formatting.count(facts.get("steps")),
        formatting.count(facts.get("tokens")),
        formatting.count(None if speed is None else round(speed)),
        formatting.score(facts.get("final_loss")),
    ]


def _seconds(report: RunReport) -> list[tuple[str, str, str]]:
    """Stage, duration, and share of the longest one for a bar."""
    seconds = report.get("seconds") or {}
    longest = max(seconds.values(), default=0) or 1
    return [(stage, formatting.duration(took), f"{100 * took / longest:.1f}%") for stage, took in seconds.items()]
