"""PDF: the text of every page is in one piece, headings are the bookmarks, and what cannot be read is counted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_ray.base.errors import DataError
from f2llm_ray.data.reading.documents import DocumentsSource
from f2llm_ray.data.reading.pdf import pdf_document
from f2llm_ray.data.reading.sections import Document
from tests.data.test_documents import LONG, rows, told
from tests.pdf_file import Bookmark, pdf_file


def sections(data: bytes) -> list[tuple[int, int, str, str]]:
    document = pdf_document(data)
    assert isinstance(document, Document)
    return [(each.line, each.level, each.heading, each.text) for each in document.sections]


def test_a_section_goes_from_its_bookmark_to_the_next_one() -> None:
    pages = [
        ["A cover.", "1 First part", "Of the first.", "1.1 A heading that", "goes on", "Inner text."],
        ["Still inner text.", "See the Second part.", "Second part", "Of the second."],
        ["No heading is on this page."],
    ]
    bookmarks = [(1, 0, "First part"), (2, 0, "A heading  that goes on"), (1, 1, "second part"), (1, 2, "Third")]
    assert sections(pdf_file(pages, bookmarks)) == [
        (1, 0, "", "A cover."),
        (1, 1, "First part", "Of the first."),
        (1, 2, "A heading that goes on", "Inner text.\nStill inner text.\nSee the Second part."),
        (2, 1, "second part", "Of the second."),
        (3, 1, "Third", "No heading is on this page."),
    ]


def test_the_second_of_two_headings_that_a_page_does_not_show_takes_no_text_from_the_first() -> None:
    bookmarks = [(1, 1, "B"), (1, 1, "not shown"), (1, 0, "A")]
    found = sections(pdf_file([["before", "A", "one"], ["B", "two", "three"]], bookmarks))
    assert found == [(1, 0, "", "before"), (1, 1, "A", "one"), (2, 1, "B", "two\nthree")]


@given(
    st.lists(st.lists(st.sampled_from(["A", "B", "1 A", "word", "A B", ""]), max_size=5), min_size=1, max_size=4),
    st.lists(st.tuples(st.just(1), st.integers(0, 3), st.sampled_from(["A", "B", "A B", "C"])), max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_every_word_of_the_pages_is_in_one_piece(pages: list[list[str]], bookmarks: list[Bookmark]) -> None:
    pages = [["word", *lines] for lines in pages]
    found = sections(pdf_file(pages, [mark for mark in bookmarks if mark[1] < len(pages)]))
    words = [word for *_, text in found for word in text.split() if word == "word"]
    assert len(words) == sum(line == "word" for lines in pages for line in lines)
    assert [line for line, *_ in found] == sorted(line for line, *_ in found)


def test_titles(tmp_path: Path) -> None:
    parts = [(1, 0, "Setup"), (2, 0, "Power")]
    page = ["Setup", LONG, "Power", f"{LONG} {LONG}"]
    (tmp_path / "a.pdf").write_bytes(pdf_file([page], parts))
    (tmp_path / "b.pdf").write_bytes(
        pdf_file([page], [(1, 0, "Setup"), (1, 0, "Power")], "Microsoft Word - b.docx")
    )
    (tmp_path / "c.pdf").write_bytes(pdf_file([page], parts, "The machine"))
    assert [query for query, _ in told(rows(tmp_path))] == [
        *("Setup", "Setup: Power"),
        *("Setup", "Power"),
        *("The machine: Setup", "The machine: Power"),
    ]


def test_without_an_outline_groups_of_pages_stand_under_the_title(tmp_path: Path) -> None:
    pages = [[f"Page {number}."] + [LONG] * 12 for number in range(7)]
    (tmp_path / "a.pdf").write_bytes(pdf_file(pages, title="The guide"))
    (tmp_path / "b.pdf").write_bytes(pdf_file(pages[:1]))
    found = rows(tmp_path / "a.pdf")
    assert [row["query"] for row in found] == ["The guide"] * 3
    assert [row["passage"].count("Page") for row in found] == [3, 3, 1]
    assert [row["drop"] for row in rows(tmp_path)] == [None] * 3 + ["clean: no heading"]


def test_what_cannot_be_read_is_counted_and_stops_no_run(tmp_path: Path) -> None:
    good = pdf_file([["One", LONG]], [(1, 0, "One")])
    files = {
        "a.pdf": pdf_file([["One", LONG]], [(1, 0, "One")], encrypted=True),
        "b.pdf": b"no PDF at all",
        "c.pdf": good[: len(good) // 3],
        "d.pdf": pdf_file([[], []], [(1, 0, "One")], title="Scanned"),
        "e.pdf": good,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    found = rows(tmp_path, "error")
    assert [row["drop"] for row in found] == [
        "clean: an encrypted PDF",
        "clean: a damaged PDF",
        "clean: a damaged PDF",
        "clean: a PDF without text",
        None,
    ]


@given(st.binary(max_size=60), st.integers(0, 600), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_no_damage_stops_a_run(noise: bytes, place: int, cut: int) -> None:
    good = pdf_file([["One", LONG]], [(1, 0, "One")])
    pdf_document(good[:place] + noise + good[place + cut :])


def test_the_package_is_asked_for_where_there_is_a_pdf(tmp_path: Path, monkeypatch: Any) -> None:
    of = DocumentsSource(paths=(str(tmp_path),))
    (tmp_path / "a.md").write_text(f"# One\n{LONG}")
    (tmp_path / "b.pdf").write_bytes(pdf_file([["One", LONG]], [(1, 0, "One")]))
    known = {file.uri: file.version for file in of.inputs("s")}
    markdown, pdf = of.pieces("s")
    assert [known[uri] for uri in of.piece_inputs(markdown)] == [""]
    assert [bool(known[uri]) for uri in of.piece_inputs(pdf)] == [False, True], (
        "a part is known by pypdf's version"
    )
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(DataError, match=r"'pypdf' is not installed; get it with: pip install 'f2llm-ray\[pdf\]'"):
        of.pieces("s")
    (tmp_path / "b.pdf").unlink()
    assert len(rows(tmp_path)) == 1
