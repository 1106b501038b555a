"""Laws of cleaning: one normal form, every limit tagged, and no text that takes long."""

from __future__ import annotations

import re
import time
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from f2llm_ray.data.clean import REPEAT_CHARS, clean, is_markup, normalize, repeats_one_character
from f2llm_ray.data.reading.base import rows_table
from f2llm_ray.data.settings import Data

MILLION = 1_000_000


@given(st.text())
def test_normalising_twice_is_normalising_once(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once
    assert once == once.strip()


def test_normal_form_keeps_what_spelling_needs() -> None:
    assert normalize("a\u0301 \u00a0\t b\r\n\n\n\nc\ufeff\x00") == "á b\n\nc"
    assert normalize("می\u200cخواهم 👩\u200d💻 क\u094dष") == "می\u200cخواهم 👩\u200d💻 क\u094dष"
    assert normalize("\u202bשלום\u202c") == "שלום"
    assert normalize("a page\fthe next\va line") == "a page\nthe next\na line"
    assert normalize(" \u200bសួ\u200bស្តី\u2060 \u200b") == "សួ\u200bស្តី", "breaks between words stay"


def row(query: str, passage: str, **fields: object) -> dict[str, object]:
    return {"language": "deu", "query": query, "passage": passage, **fields}


def tags(rows: list[dict[str, object]], **settings: object) -> list[str | None]:
    table = rows_table(rows, source="s", task="retrieval")
    return clean(table, Data(**settings))["drop"].to_pylist()


def test_cleaning_tags_each_fault_and_keeps_earlier_tags() -> None:
    rows = [
        row("a", "b"),
        row(" \u200e ", "b"),
        row("a", "\u200b \u2060"),
        row("a", "x" * 11),
        row("same", " same "),
        row("", "", drop="read: empty query"),
    ]
    assert tags(rows, max_chars=10) == [
        None,
        "clean: query too short",
        "clean: passage too short",
        "clean: passage too long",
        "clean: query equals passage",
        "read: empty query",
    ]


def test_texts_that_are_no_text_are_tagged() -> None:
    rows = [
        row("Overview " + "=" * 40, "x"),
        row("x", "a" * REPEAT_CHARS),
        row("x", "a" * (REPEAT_CHARS - 1)),
        row("x", "-" * 20 + "Kapitel eins, Seite zwei"),
        row("<br/><img src='a'>", "x"),
        row("x", "https://example.org/a?b=c"),
        row("x", "siehe https://example.org/a?b=c"),
        row("x", "&nbsp;&#160;&#xA0;"),
    ]
    assert tags(rows) == [
        "clean: query repeats one character",
        "clean: passage repeats one character",
        None,
        None,
        "clean: query is markup",
        "clean: passage is markup",
        None,
        "clean: passage is markup",
    ]
    assert tags(rows, filters={"max_repeat": 1, "max_markup": 1}) == [None] * len(rows)


def test_markup_of_code_is_code() -> None:
    tag = "<div class='a'></div>"
    rows = [
        row("x", tag, passage_language="code:html"),
        row(tag, "x", language="code:html"),
        row("y", tag, language="code:html"),
        row(tag, "x", passage_language="code:html"),
        row("x", tag, language=None),
        row("x", tag, language="code:html", passage_language="eng"),
    ]
    query, passage = "clean: query is markup", "clean: passage is markup"
    assert tags(rows) == [None, None, None, query, passage, passage]


@pytest.mark.parametrize(
    "text",
    [
        "a < b and b > c",
        "if (a<b && c>d) return;",
        "List<Item> & co; R&D",
        "x &lt y",
        "www",
        "5 <3 you",
        "→ «Ja» <",
        "&Datei",
    ],
)
def test_signs_in_plain_text_are_no_markup(text: str) -> None:
    assert not is_markup(text, 0.9)


@given(st.text("ab\u0301あ", min_size=1, max_size=80), st.floats(0.01, 1))
def test_the_longest_run_is_found_without_looking_everywhere(text: str, share: float) -> None:
    longest = max(len(list(run)) for _, run in groupby(text))
    assert repeats_one_character(text, share) == (longest > share * len(text))


@given(st.lists(st.sampled_from(["<b>", "</b>", "&amp;", "http://x.y/z", "word", "字", " "]), min_size=1))
def test_markup_is_what_tags_entities_and_urls_take_up(parts: list[str]) -> None:
    text = " ".join(parts)
    markup = sum(len(part) for part in parts if part.startswith(("<", "&", "http")))
    whole = sum(len(re.sub(r"\s", "", part)) for part in parts)
    assert is_markup(text, 0.5) == (markup > 0.5 * whole)


@pytest.mark.parametrize(
    "unit", ["a", "<", "<a", "<a ", "&", "&a", "&#", "http://", "www.", "<!--", "aab", "а́", "\r\n ", "=\n", "://"]
)
def test_a_million_characters_take_no_second(unit: str) -> None:
    text = unit * (MILLION // len(unit))
    started = time.process_time()
    is_markup(text, 0.9)
    for share in (0.01, 0.5, 0.99):
        repeats_one_character(text, share)
    assert time.process_time() - started < 1
    (tag,) = tags([row("q", text)], max_chars=2 * MILLION)
    assert tag != "clean: passage too long"
    assert time.process_time() - started < 4
