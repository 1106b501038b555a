"""The examples of docs/own-data.md are read as the page says."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from f2llm_ray.data.reading import Source

PAGE = Path(__file__).parent.parent.parent / "docs" / "own-data.md"
ROWS = [
    line.strip("| ").split(" | ")
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ")
]


def said(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def settings(cell: str) -> dict[str, Any]:
    """The first value that a cell says of each of a source's keys."""
    found: dict[str, Any] = {}
    for text in said(cell):
        if re.match(r"(format|columns|language|passage_language): ", text):
            found = {**yaml.safe_load(text), **found}
    return found


def example(starts: str) -> tuple[str, dict[str, Any]]:
    """The first example of the row that begins so, and its settings."""
    ((first, second),) = [row for row in ROWS if row[0].startswith(starts)]
    return said(first)[0], settings(second)


def read(path: Path, content: str, **entry: Any) -> list[dict[str, Any]]:
    path.write_text(content + "\n", encoding="utf-8")
    source = TypeAdapter(Source).validate_python({**entry, "paths": [str(path)]})
    tables = [table for piece in source.pieces("s") for table in source.read("s", piece, "error")]
    return [row for table in tables for row in table.to_pylist()]


def as_json(row: str) -> str:
    """The example with texts in place of its dots."""
    number = itertools.count()
    return re.sub(r'"\.\.\."', lambda _: f'"text {next(number)}"', row)


@pytest.mark.parametrize(
    ("starts", "rows", "negatives"),
    [('`{"question"', 1, 0), ("several positives", 2, 1), ("a teacher's scores", 1, 1), ("objects", 1, 0)],
)
def test_rows_of_json(tmp_path: Path, starts: str, rows: int, negatives: int) -> None:
    text, said_ = example(starts)
    if starts == "a teacher's scores":
        said_["columns"]["negatives"] = "negatives"
    if starts == "objects":
        said_["columns"].pop("negatives")
        text = json.dumps({"query": "q", **json.loads(text)})
    if starts == "several positives":
        text = text.replace('"pos": ["..."]', '"pos": ["...", "..."]')
    found = read(tmp_path / "a.jsonl", as_json(text), format="jsonl", **said_)
    assert len(found) == rows
    assert {len(row["negatives"]) for row in found} == {negatives}
    if starts == "a teacher's scores":
        assert (round(found[0]["passage_score"], 3), found[0]["negative_scores"]) == (9.1, [pytest.approx(-2.4)])


def test_sentences_with_their_numbers(tmp_path: Path) -> None:
    text, said_ = example("sentences with their numbers")
    (row,) = read(tmp_path / "a.tsv", text.replace("<tab>", "\t"), **said_)
    assert (row["language"], row["query"], row["passage_language"], row["passage"]) == (
        "eng",
        "Let's go.",
        "spa",
        "¡Vamos!",
    )


def test_translation_memories(tmp_path: Path) -> None:
    unit, said_ = example("translation memories")
    memory = f'<tmx><header srclang="en"/><body>{unit}</body></tmx>'
    (row,) = read(tmp_path / "a.tmx", memory, format=said_["format"])
    assert (row["language"], row["query"], row["passage_language"], row["passage"]) == (
        "eng",
        "Open",
        "deu",
        "Öffnen",
    )
    (row,) = read(tmp_path / "a.tmx", memory, **said_)
    assert (row["language"], row["query"]) == ("deu", "Öffnen")
