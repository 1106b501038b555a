"""Translation memories: each unit is rows or counted, whatever languages, codes and entities it has."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import pytest

from f2llm_ray.base.errors import DataError
from f2llm_ray.data.clean import normalize
from f2llm_ray.data.reading.tables import TABLE_ROWS
from f2llm_ray.data.reading.tmx import TmxSource

HEAD = (
    '<?xml version="1.0" encoding="{encoding}"?>\n{doctype}<tmx version="1.4"><header srclang="{source}"/><body>\n'
)
END = "</body></tmx>\n"


def unit(*variants: tuple[str, str], more: str = "") -> str:
    texts = "".join(f'<tuv xml:lang="{language}"><seg>{text}</seg></tuv>' for language, text in variants)
    return f"<tu{more}>{texts}</tu>\n"


def write(
    path: Path, *units: str, encoding: str = "utf-8", doctype: str = "", source: str = "en", end: str = END
) -> Path:
    text = HEAD.format(encoding=encoding, doctype=doctype, source=source) + "".join(units) + end
    path.write_bytes(text.encode(encoding))
    return path


def rows(path: Path, bad_row: Any = "error", **settings: Any) -> list[dict[str, Any]]:
    of = TmxSource(paths=(str(path),), **settings)
    return [row for piece in of.pieces("s") for table in of.read("s", piece, bad_row) for row in table.to_pylist()]


def told(found: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (row["language"], row["query"], row["passage_language"], row["passage"])
        for row in found
        if not row["drop"]
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "iso-8859-1"])
def test_a_unit_is_a_row_for_each_other_language(tmp_path: Path, encoding: str) -> None:
    path = write(
        tmp_path / "a.tmx",
        unit(("EN-US", "a &amp; b"), ("de-AT", "ä &lt; ö"), ("fr", "é")),
        unit(("de", "grün"), ("en", "green")),
        encoding=encoding,
        doctype='<!DOCTYPE tmx SYSTEM "tmx14.dtd">\n',
    )
    both = [("eng", "a & b", "deu", "ä < ö"), ("eng", "a & b", "fra", "é"), ("eng", "green", "deu", "grün")]
    assert told(rows(path)) == both
    assert told(rows(path, language="de", passage_language="eng")) == [
        ("deu", "ä < ö", "eng", "a & b"),
        ("deu", "grün", "eng", "green"),
    ]
    packed = tmp_path / "folder" / "a.tmx.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert told(rows(packed.parent)) == both


def test_codes_of_the_layout_are_no_text(tmp_path: Path) -> None:
    text = (
        'Press <bpt i="1">&lt;b&gt;<sub>no</sub></bpt>the <hi>red</hi> key<ept i="1">&lt;/b&gt;</ept><ph x="1"/>.'
    )
    path = write(tmp_path / "a.tmx", unit(("en", text), ("de", "Taste")))
    assert told(rows(path)) == [("eng", "Press the red key.", "deu", "Taste")]


def test_units_without_one_of_the_languages_are_counted_and_stop_no_run(tmp_path: Path) -> None:
    units = [unit(("en", "a"), ("fr", "b")), unit(("en", "c"), ("de", "d")), unit(("de", "e")), unit()]
    path = write(tmp_path / "a.tmx", *units)
    found = rows(path, language="eng", passage_language="deu")
    assert [row["drop"] for row in found] == ["clean: no text in deu", None, *["clean: no text in eng"] * 2]
    assert [row["drop"] for row in rows(path)][2:] == ["clean: no text in eng"] * 2


@pytest.mark.parametrize(
    ("bad", "reason", "message"),
    [
        (unit(("en", " "), ("de", "d")), "empty query", "query: found blank text"),
        (
            unit(("en", "c"), ("xx-klingon", "d")),
            "unknown passage_language",
            "passage_language: found 'xx-klingon'",
        ),
        (unit(("en", "c&nbsp;d"), ("de", "d")), "an unknown entity", "found the entity 'nbsp', expected text"),
    ],
)
def test_a_bad_unit_is_named_by_its_line(tmp_path: Path, bad: str, reason: str, message: str) -> None:
    good = unit(("en", "a"), ("de", "b"))
    path = write(tmp_path / "a.tmx", good, bad, good, doctype='<!DOCTYPE tmx SYSTEM "tmx14.dtd">')
    with pytest.raises(DataError, match=rf"a\.tmx:4: {re.escape(message)}"):
        rows(path)
    assert [row["drop"] for row in rows(path, "skip")] == [None, f"read: {reason}", None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<tmx><body><tu>", "found a file that is not XML"),
        ("not XML", "found a file that is not XML"),
        ("<html></html>", "found the element 'html', expected a TMX file"),
        (
            '<!DOCTYPE tmx [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><tmx/>',
            "found the declaration of an entity, 'a'",
        ),
        ("<tmx><header srclang='*all*'/><body><tu/></body></tmx>", "found srclang='*all*', expected the language"),
        ("<tmx><header srclang='en'/><body/></tmx>", "found no units, expected at least one"),
    ],
)
def test_files_that_are_no_translation_memory(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.tmx"
    path.write_text(content)
    with pytest.raises(DataError, match=r"source 's': .*a\.tmx") as error:
        rows(path, "skip")
    assert message in str(error.value)


def test_long_files_come_in_several_tables(tmp_path: Path) -> None:
    count = TABLE_ROWS + 10
    path = write(tmp_path / "a.tmx", *(unit(("en", f"line\n{n}"), ("de", f"Zeile {n}")) for n in range(count)))
    of = TmxSource(paths=(str(path),))
    tables = [table for piece in of.pieces("s") for table in of.read("s", piece, "error")]
    assert [len(table) for table in tables] == [TABLE_ROWS, 10]
    assert normalize(tables[1]["query"][9].as_py()) == f"line\n{count - 1}"
