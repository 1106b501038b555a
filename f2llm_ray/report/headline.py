"""The first lines of a report: the results of the run in sentences. What was not measured is left out."""

from __future__ import annotations

from collections.abc import Sequence

from f2llm_ray.base import formatting
from f2llm_ray.report.languages import named
from f2llm_ray.report.read_scores import (
    ModelEntry,
    RunReport,
    at_full,
    by_language,
    enough,
    lineage,
    main_metric,
    reference_of,
    served_of,
    sets_of,
)
from f2llm_ray.report.standing import is_behind, rows_on, standing_sentences

WEAKEST, STRONGEST = 5, 3
"""Languages of a set that are named."""


def headline(report: RunReport) -> list[str]:
    """The main numbers as sentences.

    Nothing good is said of a model on a set where BM25 or its backbone has more.
    """
    models = list(report.get("models") or [])
    reference, served = reference_of(report), served_of(report)
    sentences = []
    rows, languages = report.get("rows") or [], report.get("languages") or {}
    if rows:
        read, kept = rows[0].get("in"), rows[-1].get("out")
        where = f" in {formatting.plural(len(languages), 'language')}" if languages else ""
        sentences.append(f"{formatting.count(kept)} training rows{where}, of {formatting.count(read)} read.")
    standing = standing_sentences(report)
    sentences += standing
    trained = reference or (models[-1] if models else None)
    if trained is not None:
        first = next((found for found in lineage(models, trained)[1:] if found.get("kind") == "untrained"), None)
        results = [
            f"{main_metric([trained], name)} {formatting.score(at_full(trained, name))} on {name}"
            + _before(first, name)
            for name in sets_of([trained])
            if trained is not served or not rows_on(report, name)
        ]
        if results:
            sentences.append(f"The {trained.get('name')} model has {formatting.listed(results)}.")
    if reference is not None and models[-1] is not reference:
        sentences += _kept(report, models[-1], reference)
    if models and trained is not None:
        sentences += _better(report, models, [trained, models[-1]])
    if served is not None:
        sentences += _weakest(report, served)
    missing = report.get("missing") or []
    if missing:
        sentences.append(f"Not finished: {formatting.listed([str(stage) for stage in missing])}.")
    seconds = report.get("seconds") or {}
    if seconds:
        device = f" on {report['device']}" if report.get("device") else ""
        sentences.append(f"Its stages took {formatting.duration(sum(seconds.values()))}{device}.")
    return sentences


def _before(untrained: ModelEntry | None, name: str) -> str:
    before = None if untrained is None else at_full(untrained, name)
    return "" if before is None else f" ({formatting.score(before)} untrained)"


def _kept(report: RunReport, last: ModelEntry, reference: ModelEntry) -> list[str]:
    sets = [name for name in sets_of([last]) if not is_behind(report, name, last)]
    of = f" of the score of {reference.get('name')}"
    kept = [
        f"{formatting.share(at_full(last, name), at_full(reference, name))}{'' if index else of} on {name}"
        for index, name in enumerate(sets)
    ]
    all_of_it, outside = (
        formatting.share(last.get(key), reference.get(key)) for key in ("parameters", "non_embedding_parameters")
    )
    subject = (
        f"The {last.get('name')} model, with {all_of_it} of the parameters ({outside} outside the embeddings),"
    )
    return [f"{subject} keeps {formatting.listed(kept)}."] if kept else []


def _better(report: RunReport, models: Sequence[ModelEntry], named: Sequence[ModelEntry]) -> list[str]:
    """Names, set by set, a model that scores above all of those named before."""
    found = []
    for name in sets_of(models):
        scored = [(at_full(model, name) or 0.0, str(model.get("name"))) for model in models]
        score, best = max(scored, key=lambda item: item[0])
        entry = next(model for model in models if str(model.get("name")) == best)
        if not is_behind(report, name, entry) and score > max(at_full(model, name) or 0.0 for model in named):
            found.append(f"{best} on {name} ({formatting.score(score)})")
    those = "both" if named[0] is not named[-1] else "it"
    return [f"Better than {those}: {formatting.listed(found)}."] if found else []


def _weakest(report: RunReport, model: ModelEntry) -> list[str]:
    """In which languages the model is weak and strong, by its score at the full dim."""
    sentences = []
    for name in sets_of([model]):
        main = main_metric([model], name)
        found = enough(by_language(model, name))
        scored = sorted((facts.get(main) or 0.0, language) for language, facts in found.items())
        if len(scored) > WEAKEST + STRONGEST:
            weak, strong = (
                formatting.listed([f"{named(language)} {formatting.score(score)}" for score, language in some])
                for some in (scored[:WEAKEST], scored[: -STRONGEST - 1 : -1])
            )
            middle = scored[len(scored) // 2][0]
            best = "" if is_behind(report, name, model) else f", and strongest in {strong}"
            sentences.append(
                f"The {model.get('name')} model is weakest on {name} in {weak}{best}; "
                f"the language in the middle of {len(scored)} has {formatting.score(middle)}."
            )
    return sentences
