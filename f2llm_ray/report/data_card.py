"""The data card: what a corpus is made of and where every row went, as JSON and as a self-contained page.

The card's dict may lack any part: what was not measured says so in its place.
"""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from typing import Any

from f2llm_ray.base import formatting
from f2llm_ray.base.optional import not_installed
from f2llm_ray.base.progress import say
from f2llm_ray.data.language import UNKNOWN
from f2llm_ray.report import data_card_parts as parts
from f2llm_ray.report.data_card_parts import Card, Row
from f2llm_ray.report.page import render_page
from f2llm_ray.report.report_plots import LANGUAGES_PLOTTED
from f2llm_ray.run.folder import Folder

SOURCES_OPEN = 12
"""Sources whose lengths are seen without unfolding them."""
SAMPLES_OPEN = 5
CODE = "code:"


def write_card(folder: Folder, card: dict[str, Any]) -> None:
    """Writes card.json and card.html; without the libraries that draw the page, card.json alone, and says so."""
    folder.write_json("card.json", card)
    missing = next((package for package in ("jinja2", "matplotlib") if find_spec(package) is None), None)
    if missing is not None:
        say(f"{folder.uri}/card.html: not written: {not_installed(missing, extra='eval')}")
        return
    folder.write_bytes("card.html", render(card).encode("utf-8"))


def render(card: Card) -> str:
    """The HTML page; all text in it is escaped."""
    steps = parts.dropping_steps(card)
    by_language = parts.tally(card.get("rows") or [], parts.language_of)
    present = [name for name, found in by_language.items() if found.read]
    languages = sorted(present, key=lambda name: (-by_language[name].kept, -by_language[name].read, name))
    known = card.get("sources") or {}
    return render_page(
        "card.html",
        name=card.get("name") or "corpus",
        facts=["data card"],
        headline=headline(card),
        steps=[parts.step_cells(row) for row in card.get("steps") or []],
        sources=parts.source_cells(card),
        dropping=steps,
        out=parts.out_cells(card, steps),
        instructions=[[name, facts["instruction"]] for name, facts in known.items() if facts.get("instruction")],
        language_count=len(languages),
        languages_plotted=LANGUAGES_PLOTTED,
        language_plot=parts.language_plot(by_language, languages[:LANGUAGES_PLOTTED]),
        languages=[parts.language_cells(name, by_language[name]) for name in languages[LANGUAGES_PLOTTED:]],
        lengths=parts.length_plots(card),
        sources_open=SOURCES_OPEN,
        agreement=parts.agreement(card.get("language_check") or []),
        disagreements=parts.disagreements(card.get("language_check") or []),
        near_dedup=parts.near_dedup(card.get("near_dedup") or {}),
        curve=parts.curve(card.get("near_dedup") or {}),
        samples=parts.samples(card.get("near_dedup") or {}),
        samples_open=SAMPLES_OPEN,
        negatives=parts.negatives(card),
        contamination=parts.contamination(card),
        throughput=parts.throughput(card),
    )


def headline(card: Card) -> list[str]:
    """The main numbers as sentences; what was not measured is left out."""
    rows = card.get("rows") or []
    sentences = [_rows_kept(rows), _most_out(rows)] if rows else []
    texts, tokens, vocabulary = (card.get(key) for key in ("texts", "tokens", "vocabulary"))
    if texts and tokens is not None and vocabulary is not None:
        sentences.append(
            f"There are {formatting.plural(texts, 'distinct text')} of {formatting.plural(tokens, 'token')} "
            f"({tokens / texts:.1f} each), in a vocabulary of {formatting.count(vocabulary)}."
        )
    longer = card.get("cut_texts")
    if texts and longer:
        cut, most = sum(longer.values()), max(longer, key=lambda name: (longer[name], name))
        share, of_most = formatting.share(cut, texts), formatting.count(longer[most])
        sentences.append(
            f"{formatting.plural(cut, 'text')} ({share}) were too long and cut, most of {most} ({of_most})."
        )
    return [*sentences, *(f"{note[:1].upper()}{note[1:]}." for note in card.get("notes") or [])]


def _rows_kept(rows: list[Row]) -> str:
    of_all = parts.total(rows)
    sources = formatting.plural(len({row["source"] for row in rows}), "source")
    languages = {parts.language_of(row) for row in rows} - {UNKNOWN}
    code = sum(name.startswith(CODE) for name in languages)
    kinds = ((len(languages) - code, "language"), (code, "programming language"))
    counted = [formatting.plural(number, kind) for number, kind in kinds if number]
    where = f" in {formatting.listed(counted)}" if counted else ""
    kept = f"{formatting.count(of_all.kept)} ({formatting.share(of_all.kept, of_all.read)}) kept"
    return f"{formatting.plural(of_all.read, 'row')} of {sources}{where}, {kept}."


def _most_out(rows: list[Row]) -> str:
    reasons: Counter[str] = Counter()
    for row in rows:
        if row["drop"] is not None:
            reasons[row["drop"]] += row["rows"]
    if not reasons.total():
        return "No row was taken out."
    ((reason, most),) = reasons.most_common(1)
    share = formatting.share(most, parts.total(rows).read)
    step, _, why = reason.partition(": ")
    return f"What took most out: {step} ({why}), {formatting.plural(most, 'row')} or {share}."
