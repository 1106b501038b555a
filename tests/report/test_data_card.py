"""The data card shows the numbers it was given, adds up, stands alone, and takes any part as missing."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from f2llm_ray.report import data_card_parts as parts
from f2llm_ray.report.data_card import headline, render, write_card
from f2llm_ray.run.folder import Folder

HOSTILE = "<script>alert('$x^2$')</script>&\"_"
ARABIC = "مرحبا بالعالم، هذا نص طويل للتجربة"
HEADINGS = (
    "Steps", "Sources", "Languages", "Lengths", "Language agreement", "Near duplicates", "Negatives",
    "Contamination", "Throughput",
)  # fmt: skip


def bins(**numbers: int) -> list[int]:
    found = [0] * 24
    for name, number in numbers.items():
        found[int(name[1:])] = number
    return found


def full_card() -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {"source": "web", "language": "deu", "drop": None, "rows": 500},
        {"source": "web", "language": "deu", "drop": "clean: query too short", "rows": 60},
        {"source": "web", "language": "deu", "drop": "dedup: equal to another row", "rows": 90},
        {"source": "web", "language": "ara", "drop": None, "rows": 700},
        {"source": "web", "language": "ara", "drop": "dedup: equal to another row", "rows": 10},
        {"source": "code", "language": "code:go", "drop": None, "rows": 300},
        {"source": "code", "language": None, "drop": None, "rows": 40},
        {"source": "code", "language": None, "drop": "near_dedup: near-equal to another row", "rows": 8},
    ]
    return {
        "name": "a corpus",
        "steps": [
            {"step": "read", "in": 1708, "out": 1708, "dropped": {}},
            {"step": "clean", "in": 1708, "out": 1648, "dropped": {"query too short": 60, "too long": 0}},
            {"step": "dedup", "in": 1648, "out": 1548, "dropped": {"equal to another row": 100}},
            {"step": "near_dedup", "in": 1548, "out": 1540, "dropped": {"near-equal to another row": 8}},
        ],
        "rows": rows,
        "sources": {
            "web": {"task": "retrieval", "licence": "CC-BY-4.0", "instruction": "Find the page."},
            "code": {"task": "clustering", "licence": None, "instruction": ""},
            "empty": {"task": "retrieval", "licence": None, "instruction": ""},
        },
        "lengths": {
            "web": {"query": bins(b3=400, b5=800), "passage": bins(b5=200, b9=1000)},
            "code": {"query": bins(b0=340), "passage": bins(b12=340)},
            "empty": {"query": bins(), "passage": bins()},
        },
        "language_check": [
            {"source": "web", "claimed": "deu", "detected": "deu", "verdict": "agrees", "rows": 300},
            {"source": "web", "claimed": "deu", "detected": "nld", "verdict": "differs", "rows": 100},
            {"source": "web", "claimed": "ara", "detected": None, "verdict": None, "rows": 7},
            {"source": "code", "claimed": "deu", "detected": "nld", "verdict": "differs", "rows": 3},
            {"source": "code", "claimed": "tlh", "detected": "eng", "verdict": "unjudged", "rows": 2},
            {"source": "code", "claimed": "cmn", "detected": "zho", "verdict": "agrees", "rows": 4},
            {"source": "code", "claimed": None, "detected": "eng", "verdict": "filled", "rows": 5},
            {"source": "code", "claimed": "eng", "detected": "sco", "verdict": "differs", "rows": 1},
        ],
        "negatives": {
            "web": {"given": 1000, "dropped": {"equal to a positive": 40, "near-equal to the positive": 10}},
            "code": {"given": 0, "dropped": {}},
        },
        "near_dedup": {
            "preset": "standard", "bands": 14, "rows": 8, "shingle": 5, "min_jaccard": 0.7,
            "curve": [[n / 20, 1 - (1 - (n / 20) ** 8) ** 14] for n in range(21)],
            "documents": 3000, "candidates": 80, "accepted": 60, "clusters": 20, "clustered_documents": 55,
            "largest_cluster": 9,
            "samples": [
                {
                    "source": "web",
                    "language": "ara",
                    "kept": {"query": ARABIC, "passage": "word " * 200},
                    "dropped": {"query": f"{ARABIC}!", "passage": "words " * 200},
                }
            ] * 7,
        },
        "contamination": {"held": {"web": 12, "code": 3}, "none": {}},
        "texts": 2000,
        "tokens": 34_567,
        "vocabulary": 8000,
        "seconds": {"read": {"seconds": 12.0, "rows": 1708}, "near_dedup": {"seconds": 3.0, "rows": 1548}},
    }  # fmt: skip


class Page(HTMLParser):
    """Collects headings, rows of cells by the heading they stand under, tags, and what could be loaded."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.directed: list[str] = []
        self.inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name.split(":")[-1] in {"src", "href", "srcset"}]
        if tag == "h2":
            self.headings.append("")
        if tag == "tr":
            self.rows.setdefault(self.headings[-1], []).append([])
        if tag == "td":
            self.rows[self.headings[-1]][-1].append("")
        if tag == "p" and ("dir", "auto") in attrs:
            self.directed.append("")
            self.inside.append("directed")
        elif tag in {"h2", "td", "p"}:
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in {"h2", "td", "p"}:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        at = self.inside[-1] if self.inside else ""
        if at == "h2":
            self.headings[-1] += data
        if at == "td":
            self.rows[self.headings[-1]][-1][-1] += data
        if at == "directed":
            self.directed[-1] += data


def test_a_full_card_shows_its_numbers_in_order(tmp_path: Path) -> None:
    write_card(Folder.at(str(tmp_path)), full_card())
    assert json.loads((tmp_path / "card.json").read_text()) == full_card()
    text = (tmp_path / "card.html").read_text()
    page = Page(text)
    assert tuple(page.headings) == HEADINGS
    rows = page.rows
    assert ["clean", "1,708", "60", "1,648", "query too short 60"] in rows["Steps"]
    assert ["web", "retrieval", "1,360", "1,200", "88.2 %", "CC-BY-4.0"] in rows["Sources"]
    assert ["code", "clustering", "348", "340", "97.7 %", "not stated"] in rows["Sources"]
    assert ["empty", "retrieval", "0", "0", "", "not stated"] in rows["Sources"]
    assert ["web", "60", "100", "0"] in rows["Sources"]
    assert ["code", "0", "0", "8"] in rows["Sources"]
    assert ["web", "Find the page."] in rows["Sources"]
    assert ["web", "400", "75.0 %", "7", "0", "0"] in rows["Language agreement"]
    assert ["code", "8", "50.0 %", "0", "5", "2"] in rows["Language agreement"]
    pairs = [row for row in rows["Language agreement"] if row and "→" in row[0]]
    assert pairs == [["deu → nld", "103", "web 100 · code 3"], ["eng → sco", "1", "code 1"]]
    assert ["accepted pairs", "60 (75.0 %)"] in rows["Near duplicates"]
    assert ["preset", "standard: 14 bands of 8 rows"] in rows["Near duplicates"]
    dropped = "equal to a positive 40 · near-equal to the positive 10"
    assert ["web", "1,000", "950", "95.0 %", dropped] in rows["Negatives"]
    assert ["code", "0", "0", "", ""] in rows["Negatives"]
    assert ["held", "15", "web 12 · code 3"] in rows["Contamination"]
    assert ["none", "0", ""] in rows["Contamination"]
    assert ["read", "1,708", "12.0 s", "142", ""] in rows["Throughput"]
    assert "<b>web</b><br>median query 32–63, passage 512–1,023" in text
    assert "<b>code</b><br>median query 1, passage 4,096–8,191" in text
    assert "not measured" not in text
    assert text.count("<svg") == 4, "languages, the lengths of two sources, the S-curve"
    for label in ("700 of 710", "500 of 650", "300 of 300", "40 of 48"):
        assert label in text, "rows kept of rows read, by language"


ACCOUNT = st.lists(
    st.fixed_dictionaries(
        {
            "source": st.sampled_from(["a", "b", "c"]),
            "language": st.sampled_from([None, "und", "deu", "code:go"]),
            "drop": st.sampled_from([None, "clean: x", "clean: y", "dedup: x", "cap: x"]),
            "rows": st.integers(0, 50),
        }
    ),
    min_size=1,
    max_size=30,
)


@given(ACCOUNT)
def test_every_table_accounts_for_every_row(rows: list[dict[str, Any]]) -> None:
    card = {"rows": rows, "steps": [{"step": step} for step in ("read", "dedup", "clean")]}
    steps = parts.dropping_steps(card)
    known = [step for step in steps if step != "cap"]
    assert known == [step for step in ("dedup", "clean") if step in known], "in the order of the steps"
    read = kept = 0
    sources, outs = parts.source_cells(card), parts.out_cells(card, steps)
    for (name, _, whole, left, _, _), (same, *out) in zip(sources, outs, strict=True):
        assert name == same
        assert int(whole) == sum(map(int, out)) + int(left)
        read, kept = read + int(whole), kept + int(left)
    assert read == sum(row["rows"] for row in rows)
    assert kept == sum(row["rows"] for row in rows if row["drop"] is None)
    by_language = parts.tally(rows, parts.language_of)
    assert (read, kept) == tuple(sum(getattr(t, name) for t in by_language.values()) for name in ("read", "kept"))
    assert (read, kept) == (parts.total(rows).read, parts.total(rows).kept)


def test_the_page_stands_alone_and_is_the_same_again() -> None:
    page = render(full_card())
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)
    assert all(target.startswith("#") for target in Page(page).loads)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "plots share ids"
    assert page == render(full_card())


@pytest.mark.parametrize("missing", [*full_card(), None])
def test_any_part_may_be_missing_and_says_so(missing: str | None) -> None:
    card = {} if missing is None else {key: part for key, part in full_card().items() if key != missing}
    page = render(card)
    assert tuple(Page(page).headings) == HEADINGS
    silent = {"name", "texts", "tokens", "vocabulary"}
    assert ("not measured" in page) == (missing not in silent)
    if missing is None:
        assert page.count("not measured") == len(HEADINGS) + 1


def test_one_thing_is_not_several() -> None:
    card = full_card()
    for count, said in ((1, "instructions of 1 source<"), (2, "instructions of 2 sources<")):
        facts = {"task": "retrieval", "licence": None, "instruction": "Find it."}
        sources = {f"s{n}": facts for n in range(count)}
        assert said in render(card | {"sources": sources})


def test_steps_that_are_off_are_not_measured() -> None:
    card = full_card() | {"near_dedup": None, "language_check": [], "contamination": {}, "negatives": {}}
    assert render(card).count("not measured") == 4
    exact = full_card()
    exact["near_dedup"] |= {"min_jaccard": None, "candidates": 0, "accepted": 0, "samples": [], "curve": []}
    rows = Page(render(exact)).rows["Near duplicates"]
    assert ["least Jaccard", "none, every candidate is accepted"] in rows
    assert ["accepted pairs", "0"] in rows


def test_samples_are_clipped_and_find_their_own_direction() -> None:
    page = render(full_card())
    texts = Page(page).directed
    assert len(texts) == 7 * 4
    assert texts[0] == ARABIC
    assert texts[2] == f"{ARABIC}!"
    assert max(map(len, texts)) == parts.SAMPLE_CHARS
    assert texts[1].endswith("…")
    assert "2 more pairs" in page


def test_languages_beyond_the_plot_stand_in_a_table() -> None:
    card = full_card()
    card["rows"] = [
        {"source": "web", "language": f"l{n:02}", "drop": drop, "rows": 100 - n}
        for n in range(45)
        for drop in (None, "clean: x")
    ]
    page = render(card)
    assert "the largest 40 of 45" in page
    assert [row[0] for row in Page(page).rows["Languages"] if row] == [f"l{n}" for n in range(40, 45)]
    assert ["l44", "112", "56", "50.0 %"] in Page(page).rows["Languages"]


def test_hostile_text_is_shown_as_text() -> None:
    card = full_card()
    card["name"] = HOSTILE
    card["sources"] = {HOSTILE: {"task": HOSTILE, "licence": HOSTILE, "instruction": HOSTILE}}
    card["lengths"] = {HOSTILE: card["lengths"]["web"]}
    card["rows"] = [{"source": HOSTILE, "language": HOSTILE, "drop": f"clean: {HOSTILE}", "rows": 1}]
    card["steps"] = [{"step": HOSTILE, "in": 1, "out": 0, "dropped": {HOSTILE: 1}}]
    card["language_check"] = [
        {"source": HOSTILE, "claimed": HOSTILE, "detected": "eng", "verdict": "differs", "rows": 1}
    ]
    card["negatives"] = {HOSTILE: {"given": 1, "dropped": {HOSTILE: 1}}}
    card["contamination"] = {HOSTILE: {HOSTILE: 1}}
    card["seconds"] = {HOSTILE: {"seconds": 0.0, "rows": 1}}
    texts = {"query": HOSTILE, "passage": HOSTILE}
    card["near_dedup"]["samples"] = [
        {"source": HOSTILE, "language": HOSTILE, "kept": texts, "dropped": texts},
    ]
    page = render(card)
    assert "<script" not in page
    assert "script" not in Page(page).tags
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert any("&lt;script&gt;alert('$x^2$')&lt;/script&gt;" in svg for svg in svgs), "not read as mathematics"


def test_the_headline_says_what_was_kept_and_what_took_most_out() -> None:
    words = " ".join(headline(full_card()))
    assert "1,708 rows of 2 sources in 2 languages and 1 programming language, 1,540 (90.2 %) kept." in words
    assert "What took most out: dedup (equal to another row), 100 rows or 5.9 %." in words
    assert "2,000 distinct texts of 34,567 tokens (17.3 each), in a vocabulary of 8,000." in words
    one = {"rows": [{"source": "a", "language": None, "drop": None, "rows": 1}]}
    assert headline(one) == ["1 row of 1 source, 1 (100.0 %) kept.", "No row was taken out."]


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_the_libraries_of_the_page_the_numbers_are_still_written(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    write_card(Folder.at(str(tmp_path)), full_card())
    assert json.loads((tmp_path / "card.json").read_text()) == full_card()
    assert not (tmp_path / "card.html").exists()
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"card.html: not written: package '{package}' is not installed" in said
