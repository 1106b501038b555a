"""Folders of documents: every piece of a document is a row of its heading, or counted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from f2llm_ray.base.errors import DataError
from f2llm_ray.data.clean import normalize
from f2llm_ray.data.reading.documents import DocumentsSource
from f2llm_ray.data.reading.sections import html_document, markdown_document, plain_document

LONG = "This is a text of more than fifty characters, as sections are."


def rows(path: Path, bad_row: Any = "error", **settings: Any) -> list[dict[str, Any]]:
    of = DocumentsSource(paths=(str(path),), **settings)
    return [row for piece in of.pieces("s") for table in of.read("s", piece, bad_row) for row in table.to_pylist()]


def told(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["query"], normalize(row["passage"])) for row in found if not row["drop"]]


def sections(document: Any) -> list[tuple[int, int, str, str]]:
    return [(each.line, each.level, each.heading, normalize(each.text)) for each in document.sections]


def test_markdown_has_headings_of_two_kinds_and_none_in_code() -> None:
    text = "\n".join(
        [
            *("---", "title: 'The guide'", "---", "Before.", ""),
            *("# First *one* #", "", "See [the page](http://x.org/a), ![a sign](s.png)now.", "<!-- # no", " -->"),
            *("```sh", "# a comment", "```", "## Second `two`", "text #1", "#hashtag", ""),
            *("Third", "-----", "", "and", "", "---", "", "- a", "---", "", "####", "nameless"),
        ]
    )
    found = markdown_document(text)
    assert found.title == "The guide"
    assert sections(found) == [
        (4, 0, "", "Before."),
        (6, 1, "First one", "See the page, now.\n\n```sh\n# a comment\n```"),
        (14, 2, "Second two", "text #1\n#hashtag"),
        (18, 2, "Third", "and\n\n---\n\n- a\n---"),
        (28, 4, "", "nameless"),
    ]
    assert markdown_document("## a\nx\n# b\ny\n# c\nz").title == "b"
    assert markdown_document("x").title == ""


def test_html_is_read_without_what_stands_around_it() -> None:
    text = (
        "<!doctype html><html><head><title>The &lt;site&gt;</title><style>h1 {}</style></head><body>"
        "<nav><h2>Menu</h2><a href=/>Home</a></nav>\n<p>Before\nit<br>all.</p>\n<h1>First <a href='#f'>¶</a></h1>"
        "<p>One <b>bold</b>word,</p><p>two.</p><script>if (a < b) '</p>'</script><pre>a\n  b</pre>\n"
        "<h2>Second</h2><ul><li>x<li>y</ul><svg><title>no</title></svg><footer>Imprint</footer></body></html>"
    )
    found = html_document(text)
    assert found.title == "The <site>"
    assert sections(found) == [
        (1, 0, "", "Before it\nall."),
        (4, 1, "First", "One boldword,\n\ntwo.\n\na\nb"),
        (6, 2, "Second", "x\ny"),
    ]
    open_nav = html_document("<nav><p>Menu<h1>First</h1><p>text")
    assert sections(open_nav) == [(1, 0, "", "Menu"), (1, 1, "First", "text")], "what nobody closes hides nothing"
    assert sections(html_document("<h1>open<p>text"))[0][:2] == (1, 1)


def test_plain_text_has_a_title_that_stands_alone() -> None:
    assert sections(plain_document("\n The title \n\nOne.\n\nTwo.\n")) == [(2, 1, "The title", "One.\n\nTwo.")]
    assert sections(plain_document("One\nline.\n\nTwo.")) == [(1, 0, "", "One\nline.\n\nTwo.")]
    assert sections(plain_document(" \n")) == []


@given(st.lists(st.sampled_from(["# a", "b", "", "```", "===", "<p>", "<h2>c", "</h2>", "<nav>", "d e", "---"])))
def test_no_text_of_a_document_is_lost(parts: list[str]) -> None:
    text = "\n".join(parts)
    words = {word for word in ("b", "d") for part in parts if part[:1] == word}
    for document in (plain_document(text), markdown_document(f"x\n{text}"), html_document(text)):
        found = " ".join(f"{each.heading} {each.text}" for each in document.sections).split()
        assert words <= {*found}, document


@pytest.mark.parametrize(
    "part", ["[", "](", "<!--", "`", "<", "<a ", "<a b='", "<a =", "</", "<![", "&", "<script>", "<h1>"]
)
def test_no_document_takes_long(part: str) -> None:
    started = time.process_time()
    markdown_document(part * 50_000)
    html_document(part * 50_000)
    markdown_document("# " + " " * 200_000 + "x")
    assert time.process_time() - started < 5


def test_every_piece_of_every_file_is_a_row_or_counted(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        f"intro\n# Guide\n\n{LONG}\n## Install\n{LONG} {LONG}\n## Short\nfew\n## Parts\n### None\n"
    )
    (tmp_path / "b.html").write_bytes(f'<meta charset="latin1"><h1>Grün é</h1><p>{LONG}'.encode("latin-1"))
    (tmp_path / "c.txt").write_bytes(f"Titel\n\n{LONG}".encode("utf-16"))
    (tmp_path / "d.txt").write_text(" \n")
    (tmp_path / "e.txt").write_text(f"{LONG}\n{LONG}")
    (tmp_path / "notes.rtf").write_text("x")
    found = rows(tmp_path, language="eng")
    assert [row["drop"] for row in found] == [
        "clean: section too short",
        None,
        None,
        "clean: section too short",
        *["clean: a heading without text"] * 2,
        None,
        None,
        "clean: no text",
        "clean: no heading",
    ]
    assert told(found) == [
        ("Guide", LONG),
        ("Guide: Install", f"{LONG} {LONG}"),
        ("Grün é", LONG),
        ("Titel", LONG),
    ]
    assert {row["language"] for row in found} == {"eng"}
    of = DocumentsSource(paths=(str(tmp_path),))
    (note,) = of.notes("s")
    assert "1 files passed over, having another ending than .md, .markdown, .html, .htm, .txt or .pdf" in note
    assert told(rows(tmp_path / "a.md", titles=False, min_section=2))[2:] == [
        ("Install", f"{LONG} {LONG}"),
        ("Short", "few"),
    ]


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"# a\n" + LONG.encode() + b"\xff")
    with pytest.raises(DataError, match=r"a\.md:1: found byte 0xff at byte \d+ of the file, expected UTF-8"):
        rows(tmp_path)
    assert [row["drop"] for row in rows(tmp_path, "skip")] == ["read: not UTF-8"]
    (tmp_path / "a.md").rename(tmp_path / "a.html")
    (tmp_path / "a.html").write_text("<meta charset=klingon>")
    with pytest.raises(
        DataError, match=r"a\.html:1: found charset=klingon, expected an encoding that Python knows"
    ):
        rows(tmp_path)


def test_the_example_of_the_page(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "own-data.md").read_text(encoding="utf-8")
    example = page.partition("## Documents")[2].partition("```markdown\n")[2].partition("```")[0]
    (tmp_path / "setup.md").write_text(example)
    found = rows(tmp_path, language="eng")
    assert [query for query, _ in told(found)] == ["Setup", "Setup: Power"]
    assert [row["drop"] for row in found][2:] == ["clean: section too short"]


def test_who_wants_passages_alone_gets_texts_without_heading_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{LONG}\n{LONG}")
    (tmp_path / "b.md").write_text(f"few\n# One\n{LONG}\n## None\n")
    of = DocumentsSource(paths=(str(tmp_path),))
    found = [
        row
        for piece in of.pieces("s")
        for table in of.read_passages("s", piece, "error")
        for row in table.to_pylist()
    ]
    assert [row["drop"] for row in found] == [
        None,
        "clean: section too short",
        None,
        "clean: a heading without text",
    ]
    assert next(row["drop"] for row in rows(tmp_path)) == "clean: no heading"
    assert found[0]["passage"] == f"{LONG}\n{LONG}"
