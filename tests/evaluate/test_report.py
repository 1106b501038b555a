"""The report shows the numbers it was given, stands alone, and takes any part as missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from f2llm_ray.evaluate.report import TERMINAL_COLUMNS, headline, render, terminal_table, write_report
from f2llm_ray.run import Folder

LANGUAGES = [f"l{i:02}" for i in range(45)]
HOSTILE = "<script>alert('$x^2$')</script>&\"_"


def model(name: str, quality: float, dim: int, sets: tuple[str, ...]) -> dict[str, Any]:
    def scores(value: float) -> dict[str, float]:
        return {"ndcg@10": value, "acc@1": value * 0.8, "recall@10": value * 1.1}

    return {
        "name": name,
        "folder": f"{name}-0a1b2c3d/model",
        "parameters": dim * 50_000,
        "non_embedding_parameters": dim * 20_000,
        "bytes": dim * 200_000,
        "scores": {s: {str(dim // n): scores(quality / n**0.1) for n in (1, 2, 4, 8)} for s in sets},
        "languages": {
            s: {
                str(dim): {
                    lang: {"queries": 7 + i, **scores(quality - i / 500)} for i, lang in enumerate(LANGUAGES)
                }
            }
            for s in sets
        },
    }


def full_report(sets: tuple[str, ...] = ("manual", "phrases")) -> dict[str, Any]:
    models = [
        ("untrained", 0.051, 256),
        ("stage1", 0.602, 256),
        ("stage2", 0.741, 256),
        ("pruned", 0.322, 192),
        ("distilled", 0.713, 192),
    ]
    return {
        "name": "a run",
        "created": "2026-01-02T03:04:05Z",
        "root": "runs/a",
        "device": "cpu (x86_64)",
        "libraries": {"python": "3.11.9", "torch": "2.13.0"},
        "rows": [
            {"step": "read", "in": 5000, "out": 5000, "dropped": {}},
            {"step": "clean", "in": 5000, "out": 4321, "dropped": {"too short": 600, "same": 79, "long": 0}},
        ],
        "languages": {lang: 2000 - 10 * i for i, lang in enumerate(LANGUAGES)},
        "sources": {"web": {"task": "retrieval", "rows": 4321, "licence": None}},
        "seconds": {"prepare": 12.34, "stage1": 3723.0},
        "training": {
            "stage1": {
                "steps": 900,
                "tokens": 1_234_567,
                "tokens_per_second": 8123.4,
                "final_loss": 1.2345,
                "loss": [[step, 5 / step] for step in range(1, 901)],
                "validation": [[450, 1.5], [900, None]],
            }
        },
        "models": [model(*facts, sets) for facts in models],
        "serving": {"model": "distilled"},
        "commands": {"serve": "serve run app"},
    }


class Cells(HTMLParser):
    """Collects the text of table rows and all attributes that could load something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name.split(":")[-1] in {"src", "href", "srcset"}]
        self.cell = tag in {"td", "span"} and (tag == "td" or self.cell)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.rows[-1][-1] += data


def test_a_full_report_shows_its_numbers(tmp_path: Path) -> None:
    report = full_report()
    write_report(Folder.at(str(tmp_path)), report)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    page = (tmp_path / "report.html").read_text()
    rows = Cells(page).rows
    assert ["stage2", "256", "0.741", "0.593", "0.815", ""] in rows
    assert ["distilled", "192", "0.713", "0.570", "0.784", "96.2 %"] in rows
    assert ["distilled", "9,600,000", "3,840,000", "38.4 MB", "distilled-0a1b2c3d/model"] in rows
    assert ["clean", "5,000", "4,321", "too short 600 · same 79"] in rows
    assert ["web", "retrieval", "4,321", "not stated"] in rows
    assert ["stage1", "900", "1,234,567", "8,123", "1.234"] in rows
    assert ["stage1", "1 h 2 min", ""] in rows
    of_languages = [row for row in rows if len(row) == 6 and row[0] in LANGUAGES]
    assert [row[0] for row in of_languages[: len(LANGUAGES)]] == LANGUAGES[::-1], "the weakest first"
    assert of_languages[0] == ["l44", "51", "0.625", "0.500", "0.688", "95.7 %"]
    assert "the largest 40 of 45" in page
    assert "not measured" not in page
    assert page.count("<svg") == 4, "two curves over dims, the languages, one loss"


def test_the_page_stands_alone() -> None:
    page = render(full_report())
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)
    assert all(target.startswith("#") for target in Cells(page).loads)
    ids = re.findall(r' id="([^"]+)"', page)
    assert ids
    assert len(ids) == len(set(ids)), "plots share ids"


@pytest.mark.parametrize("missing", [*full_report(), None])
def test_any_part_may_be_missing(missing: str | None) -> None:
    whole = {**full_report(("manual",)), "languages": {"eng": 2}}
    report = {} if missing is None else {key: part for key, part in whole.items() if key != missing}
    page = render(report)
    headline(report)
    if missing in {None, "rows", "models", "training", "seconds", "languages", "sources", "libraries"}:
        assert "not measured" in page
    assert ("not measured" in terminal_table(report)) == (missing in {None, "models"})


def test_models_without_numbers_are_shown_as_not_measured() -> None:
    report = {
        "models": [
            {"name": "stage1", "scores": {"manual": {"64": {"ndcg@10": 0.5}}}},
            {"name": "pruned", "scores": {"manual": {}}, "languages": None},
            {"name": "distilled", "scores": None},
        ],
        "rows": [{"step": "read"}],
        "training": {"stage1": {}},
    }
    rows = Cells(render(report)).rows
    none = "not measured"
    assert ["stage1", "64", "0.500", none, none, ""] in rows
    assert ["pruned", none, none, none, none, none] in rows
    assert ["distilled", none, none, none, ""] in rows
    assert ["stage1", none, none, none, none] in rows
    assert terminal_table(report).splitlines()[2].split() == ["stage1", "-", "-", "0.500", "-", "-"]


def test_hostile_text_is_shown_as_text() -> None:
    report = full_report((HOSTILE,))
    report |= dict.fromkeys(("name", "device", "root", "created"), HOSTILE)
    report["languages"] = {HOSTILE: 3}
    report["commands"] = {HOSTILE: HOSTILE}
    report["sources"] = {HOSTILE: {"task": HOSTILE, "rows": 1, "licence": HOSTILE}}
    report["training"] = {HOSTILE: report["training"]["stage1"]}
    report["seconds"] = {HOSTILE: 1.0}
    for facts in report["models"]:
        facts["name"] = HOSTILE + facts["name"]
    page = render(report)
    assert "<script" not in page
    assert "script" not in Cells(page).tags
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert any("&lt;script&gt;alert('$x^2$')&lt;/script&gt;" in svg for svg in svgs), "not read as mathematics"


def test_terminal_table_holds_the_numbers_and_fits() -> None:
    report = full_report()
    lines = terminal_table(report).splitlines()
    assert max(map(len, lines)) <= TERMINAL_COLUMNS
    for line, facts in zip(lines[2:], report["models"], strict=True):
        expected = [facts["name"]]
        expected += [f"{facts[key] / 1e6:.1f}M" for key in ("parameters", "non_embedding_parameters")]
        for scores in facts["scores"].values():
            full, *smaller = scores.values()
            expected += [f"{value:.3f}" for value in full.values()]
            expected += [f"{values['ndcg@10']:.3f}" for values in smaller]
        assert line.split() == expected


def test_more_sets_than_fit_follow_below() -> None:
    table = terminal_table(full_report(tuple(f"set{i}" for i in range(5))))
    assert max(map(len, table.splitlines())) <= TERMINAL_COLUMNS
    assert table.count("distilled") == 3
    assert re.findall(r"set\d", table) == [f"set{i}" for i in range(5)]


def test_headline_says_what_was_gained_and_kept() -> None:
    words = " ".join(headline(full_report()))
    assert "4,321 training rows in 45 languages, of 5,000 read." in words
    assert "The stage2 model reaches ndcg@10 0.741 on manual (0.051 untrained)" in words
    assert "with 75.0 % of the parameters outside the embeddings, keeps 96.2 % of that on manual" in words
    assert "The run took 1 h 2 min on cpu (x86_64)." in words
