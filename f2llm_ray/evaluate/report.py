"""The report of a run: JSON, one HTML page that needs nothing else, and model cards.

The report's dict may lack any part: a run that has not measured something says so in that place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from f2llm_ray import words
from f2llm_ray.evaluate.model_card import write_cards
from f2llm_ray.evaluate.report_plots import LANGUAGES_PLOTTED, Plots, plots_of
from f2llm_ray.evaluate.resources import by_resources
from f2llm_ray.evaluate.scored import (
    BITS,
    FEW,
    at_full,
    by_dim,
    by_language,
    interval,
    main_metric,
    megabytes,
    metrics_of,
    sets_of,
)
from f2llm_ray.page import render_page
from f2llm_ray.run import Folder

Report = Mapping[str, Any]
Model = Mapping[str, Any]
Cells = list[list[str]]

WEAKEST = 5
"""Languages of a set that the headline names."""
LANGUAGES_OPEN = 20
"""Rows of the per-language table that are seen without unfolding it."""

TYPES_OPEN = 9
"""The same of the table of smaller vectors: three dims."""


def write_report(root: Folder, report: dict[str, Any]) -> None:
    """Writes report.json, report.html and plots/ into the run's root, and a card into the folder of each model."""
    plots = plots_of(report)
    root.write_json("report.json", report)
    root.write_bytes("report.html", render(report, plots).encode("utf-8"))
    (root / "plots").clear()
    for plot in plots.all():
        (root / "plots").write_bytes(plot.file, plot.png())
    write_cards(root, report)


def render(report: Report, plots: Plots) -> str:
    """The HTML page; all text in it is escaped."""
    models = list(report.get("models") or [])
    reference = _reference(report)
    against = [] if reference is None else [f"of {reference.get('name')}"]
    return render_page(
        "evaluate/report.html",
        name=report.get("name") or "run",
        facts=[str(report[key]) for key in ("created", "device", "root") if report.get(key)],
        headline=headline(report),
        quality=[
            (name, _scores_head(models, name), _quality(models, reference, name)) for name in sets_of(models)
        ],
        matryoshka=plots.matryoshka,
        types=_types(models[-1]) if models else [],
        type_plots=dict(plots.types),
        sizes=[_sizes(model) for model in models],
        last=str(models[-1].get("name")) if models else "",
        against=against,
        languages=[
            (name, _scores_head(models, name), _languages(models[-1], reference, name))
            for name in sets_of(models[-1:])
        ],
        resources=[
            (name, main_metric(models, name), _resources(models[-1], report, reference, name))
            for name in sets_of(models[-1:])
        ],
        missing=[str(stage) for stage in report.get("missing") or []],
        open_rows=LANGUAGES_OPEN,
        open_types=TYPES_OPEN,
        plotted=LANGUAGES_PLOTTED,
        steps=[_step(row) for row in report.get("rows") or []],
        sources=_sources(report),
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


def headline(report: Report) -> list[str]:
    """The main numbers as sentences; what was not measured is left out."""
    models = list(report.get("models") or [])
    reference = _reference(report)
    sentences = []
    rows, languages = report.get("rows") or [], report.get("languages") or {}
    if rows:
        read, kept = rows[0].get("in"), rows[-1].get("out")
        where = f" in {words.plural(len(languages), 'language')}" if languages else ""
        sentences.append(f"{words.count(kept)} training rows{where}, of {words.count(read)} read.")
    trained = reference or (models[-1] if models else None)
    if trained is not None:
        results = [
            f"{main_metric([trained], name)} {words.score(at_full(trained, name))} on {name}"
            + _before(models[0], trained, name)
            for name in sets_of([trained])
        ]
        if results:
            sentences.append(f"The {trained.get('name')} model reaches {words.listed(results)}.")
    if reference is not None:
        sentences += _kept(models[-1], reference)
    if models:
        sentences += _weakest(models[-1])
    missing = report.get("missing") or []
    if missing:
        sentences.append(f"Not finished: {words.listed([str(stage) for stage in missing])}.")
    seconds = report.get("seconds") or {}
    if seconds:
        device = f" on {report['device']}" if report.get("device") else ""
        sentences.append(f"Its stages took {words.duration(sum(seconds.values()))}{device}.")
    return sentences


# What the report holds


def _reference(report: Report) -> Model | None:
    """The model that the pruned one and those made from it are held against; None before there are both."""
    models = report.get("models") or []
    wanted = report.get("reference") if _shrunk(models) else None
    return next((model for model in models if model.get("name") == wanted), None)


def _shrunk(models: Sequence[Model]) -> Sequence[Model]:
    """The pruned model and those made from it."""
    names = [model.get("name") for model in models]
    return models[names.index("pruned") :] if "pruned" in names else []


# The parts of the page


def _before(first: Model, trained: Model, name: str) -> str:
    before = at_full(first, name)
    known = first is not trained and first.get("name") == "untrained" and before is not None
    return f" ({words.score(before)} untrained)" if known else ""


def _kept(last: Model, reference: Model) -> list[str]:
    kept = [
        f"{words.share(at_full(last, name), at_full(reference, name))}{'' if index else ' of that'} on {name}"
        for index, name in enumerate(sets_of([last]))
    ]
    size = words.share(last.get("non_embedding_parameters"), reference.get("non_embedding_parameters"))
    subject = f"The {last.get('name')} model, with {size} of the parameters outside the embeddings,"
    return [f"{subject} keeps {words.listed(kept)}."] if kept else []


def _scores_head(models: Sequence[Model], name: str) -> list[str]:
    """The metrics of a set as a table shows them: the main one with its interval, then the others."""
    main, *others = metrics_of(models, name) or ["score"]
    return [main, "95 % interval", *others]


def _scores_cells(models: Sequence[Model], name: str, facts: Mapping[str, Any]) -> list[str]:
    main, *others = (words.score(facts.get(metric)) for metric in metrics_of(models, name) or ["score"])
    return [main, interval(facts), *others]


def _quality(models: Sequence[Model], reference: Model | None, name: str) -> Cells:
    """Rows of model, d and the metrics at d, and the main one as a share of the reference's."""
    shrunk = _shrunk(models)
    rows = []
    for model in models:
        dim, facts = next(iter(by_dim(model, name).items()), (None, {}))
        row = [str(model.get("name")), words.count(dim), *_scores_cells(models, name, facts)]
        if reference is not None:
            share = words.share(at_full(model, name), at_full(reference, name))
            row.append(share if model in shrunk else "")
        rows.append(row)
    return rows


def _types(model: Model) -> list[tuple[str, Cells]]:
    """By set, a row per dim and type: the score, megabytes of a million vectors, and how long a search takes."""
    sets, searches = [], model.get("search_ms") or {}
    for name, found in (model.get("types") or {}).items():
        rows = [
            [
                words.count(dim),
                kind,
                words.score(found[str(dim)].get(kind)),
                words.count(megabytes(dim, kind)),
                words.milliseconds((searches.get(str(dim)) or {}).get(kind)),
            ]
            for dim in sorted(map(int, found), reverse=True)
            for kind in BITS
        ]
        sets.append((name, rows))
    return sets


def _sizes(model: Model) -> list[str]:
    numbers = [words.count(model.get(key)) for key in ("parameters", "non_embedding_parameters")]
    return [
        str(model.get("name")),
        *numbers,
        words.byte_size(model.get("bytes")),
        words.milliseconds(model.get("query_ms")),
        str(model.get("folder") or ""),
    ]


def _languages(model: Model, reference: Model | None, name: str) -> Cells:
    """Rows of language, queries and the metrics at d, and the main one against the reference's; weakest first."""
    found, main = by_language(model, name), main_metric([model], name)
    theirs = {} if reference is None else by_language(reference, name)
    rows = []
    for language in sorted(found, key=lambda language: (found[language].get(main) or 0.0, language)):
        facts = found[language]
        row = [language, words.count(facts.get("queries")), *_scores_cells([model], name, facts)]
        if reference is not None:
            row.append(words.share(facts.get(main), (theirs.get(language) or {}).get(main)))
        rows.append(row)
    return rows


def _weakest(model: Model) -> list[str]:
    """Which languages the model is weak in, by its score at the full dim; a few queries say too little."""
    sentences = []
    for name in sets_of([model]):
        main = main_metric([model], name)
        found = by_language(model, name)
        scored = sorted(
            (facts.get(main) or 0.0, language)
            for language, facts in found.items()
            if facts.get("queries", FEW) >= FEW
        )
        if len(scored) > WEAKEST:
            named = [f"{language} {words.score(score)}" for score, language in scored[:WEAKEST]]
            middle = scored[len(scored) // 2][0]
            sentences.append(
                f"The {model.get('name')} model is weakest on {name} in {words.listed(named)}; "
                f"the language in the middle of {len(scored)} has {words.score(middle)}."
            )
    return sentences


def _resources(model: Model, report: Report, reference: Model | None, name: str) -> Cells:
    """Rows of class, languages, training rows of each, the mean score, and that as a share of the reference's."""
    trained, main = report.get("languages") or {}, main_metric([model], name)
    theirs = {} if reference is None else by_language(reference, name)
    rows = []
    for group in by_resources(by_language(model, name), trained):
        mean = group.mean(group.scores, main)
        row = [group.name, str(len(group.languages)), group.rows(trained), words.score(mean)]
        if reference is not None:
            row.append(words.share(mean, group.mean(theirs, main)))
        rows.append(row)
    return rows


def _step(row: Mapping[str, Any]) -> list[str]:
    dropped = words.tallied(row.get("dropped") or {})
    return [str(row.get("step")), words.count(row.get("in")), words.count(row.get("out")), dropped]


def _sources(report: Report) -> Cells:
    sources = report.get("sources") or {}
    return [
        [
            name,
            str(facts.get("task") or ""),
            words.count(facts.get("rows")),
            str(facts.get("licence") or "not stated"),
        ]
        for name, facts in sources.items()
    ]


def _training(stage: str, facts: Mapping[str, Any]) -> list[str]:
    speed = facts.get("tokens_per_second")
    return [
        stage,
        words.count(facts.get("steps")),
        words.count(facts.get("tokens")),
        words.count(None if speed is None else round(speed)),
        words.score(facts.get("final_loss")),
    ]


def _seconds(report: Report) -> list[tuple[str, str, str]]:
    """Stage, duration, and share of the longest one for a bar."""
    seconds = report.get("seconds") or {}
    longest = max(seconds.values(), default=0) or 1
    return [(stage, words.duration(took), f"{100 * took / longest:.1f}%") for stage, took in seconds.items()]
