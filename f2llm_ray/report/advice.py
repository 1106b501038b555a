"""What to try next: each line follows from what the run measured, and is left out where it does not.

A line is a function of the report; a new one is a function here and its name in `LINES`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from f2llm_ray.base import formatting
from f2llm_ray.report.languages import named
from f2llm_ray.report.read_scores import (
    RunReport,
    by_language,
    enough,
    lineage,
    main_metric,
    served_of,
    sets_of,
)
from f2llm_ray.report.standing import below

MOST = 4
FALLING = 0.01
"""Share by which the last validation's loss is below all before it while more steps are worth trying."""
MANY_CUT = 0.05
"""Share of the texts."""
FAR_BELOW = 0.5
"""Share of the mean over languages."""
NAMED = 5
"""Languages in a line."""


def advice(report: RunReport) -> list[str]:
    """At most `MOST` lines, what weighs most first."""
    found = (line(report) for line in LINES)
    return [sentence for sentence in found if sentence is not None][:MOST]


def below_bm25(report: RunReport) -> str | None:
    """The served model is surely below a search by words."""
    sets = below(report, "bm25")
    if not sets:
        return None
    start = report.get("backbone")
    if start is None:
        way = "start from a ready backbone, as the recipe adapt-e5-small does"
    else:
        way = f"train on pairs like those of the set, or start from another backbone than {start}"
    return f"Below BM25 on {formatting.listed(sets)}: {way}."


def below_backbone(report: RunReport) -> str | None:
    """Training made the served model surely worse than what it started from."""
    sets = below(report, "backbone")
    return f"Below its backbone on {formatting.listed(sets)}: a lower lr, or fewer steps." if sets else None


def still_falling(report: RunReport) -> str | None:
    """The loss on held-out rows was still falling when the last training of the served model ended."""
    served, training = served_of(report), report.get("training") or {}
    if served is None:
        return None
    stage = next(
        (model["name"] for model in lineage(report["models"], served) if model.get("name") in training), None
    )
    curve = [
        (step, loss) for step, loss in (training.get(stage) or {}).get("validation") or [] if loss is not None
    ]
    if len(curve) < 2:
        return None
    (step, loss), (last_step, last_loss) = min(curve[:-1], key=lambda point: point[1]), curve[-1]
    if last_loss > loss * (1 - FALLING):
        return None
    place = "distill" if stage == "distilled" else f"stages.{stage}"
    return (
        f"The validation loss of {stage} was still falling at its end ({loss:.3f} at step {step:,}, "
        f"{last_loss:.3f} at step {last_step:,}): more steps ({place}.max_steps or epochs)."
    )


def many_cut(report: RunReport) -> str | None:
    """Much of the text was not read."""
    cut, texts = report.get("cut_texts") or {}, report.get("texts")
    if not texts or sum(cut.values()) < MANY_CUT * texts:
        return None
    share, most = formatting.share(sum(cut.values()), texts), max(cut, key=lambda name: (cut[name], name))
    limit = formatting.count(report.get("max_tokens"))
    return f"{share} of the texts were cut at {limit} tokens, most of {most}: a larger data.max_tokens."


def thin_languages(report: RunReport) -> str | None:
    """Languages are far below the mean, and have fewer training rows than most."""
    served, trained = served_of(report), report.get("languages") or {}
    if served is None or not trained:
        return None
    for name in sets_of([served]):
        main = main_metric([served], name)
        found = enough(by_language(served, name))
        scores = {language: float(facts.get(main) or 0.0) for language, facts in found.items()}
        if len(scores) < 2:
            continue
        mean = statistics.mean(scores.values())
        middle = statistics.median(trained.get(language, 0) for language in scores)
        low = [
            language
            for language in sorted(scores, key=lambda language: (scores[language], language))
            if scores[language] < FAR_BELOW * mean and trained.get(language, 0) < middle
        ]
        if low:
            told = [
                f"{named(language)} {formatting.score(scores[language])} with "
                f"{formatting.plural(trained.get(language, 0), 'row')}"
                for language in low[:NAMED]
            ]
            more = f" and {len(low) - NAMED} more" if len(low) > NAMED else ""
            return (
                f"Far below the mean of {formatting.score(mean)} on {name}, and with few training rows: "
                f"{', '.join(told)}{more}: more data of these languages."
            )
    return None


def nothing_held_out(report: RunReport) -> str | None:
    """No search was measured."""
    sets = report.get("sets")
    if sets is None or any(facts.get("kind") == "retrieval" for facts in sets.values()):
        return None
    return "No retrieval set was measured: hold out queries and passages of your own, as one of evaluation.sets."


LINES: tuple[Callable[[RunReport], str | None], ...] = (
    below_bm25,
    below_backbone,
    nothing_held_out,
    still_falling,
    many_cut,
    thin_languages,
)


def cut_sentence(report: RunReport) -> str:
    """How many texts were cut, by source; "" for none."""
    cut, texts = report.get("cut_texts") or {}, report.get("texts")
    if not texts or not any(cut.values()):
        return ""
    count, share = sum(cut.values()), formatting.share(sum(cut.values()), texts)
    limit = formatting.count(report.get("max_tokens"))
    return (
        f"{count:,} of {texts:,} distinct texts ({share}) are longer than data.max_tokens ({limit}) and were cut: "
        f"{formatting.tallied(cut)}."
    )
