"""Users' tables of evaluation sets: parquet, JSON lines or TSV, as columns that are checked on use."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from f2llm_ray.base.errors import DataError
from f2llm_ray.run.folder import Folder

UNKNOWN_LANGUAGE = "und"
"""ISO 639-3 for "undetermined": the language of a text that comes without one."""
LANGUAGE = ("language", "lang")
TITLE, SCORE = "title", "score"

HALF_A_PAIR = re.compile("[\ud800-\udfff]")
"""What JSON can spell and UTF-8 cannot: a text that was cut inside an emoji."""

Columns = dict[str, list[Any]]
Lines = list[tuple[int, str]]
ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Table:
    """The columns of one file. Methods that take spellings take the first of them that the file has.

    Every method raises DataError with the file, the row, what was found and what was expected.
    """

    place: str
    """The file, for messages."""
    names: list[str]
    """All columns of the file."""
    columns: Columns
    """The values of those that were asked for."""

    def column(self, *spellings: str) -> list[Any]:
        """The values of a column that must be there."""
        name = next((spelling for spelling in spellings if spelling in self.columns), None)
        if name is None:
            raise DataError(
                f"{self.place}: no column {' or '.join(spellings)}; found {sorted(self.names) or 'none'}"
            )
        return self.columns[name]

    def ids(self, *spellings: str) -> list[str]:
        """Ids or labels: texts or whole numbers, not empty."""
        found = self.column(*spellings)
        for row, value in enumerate(found, start=1):
            if not isinstance(value, str | int) or value == "":
                raise self._wrong(row, spellings[0], value, "a text or a whole number")
        return list(map(str, found))

    def texts(self, *spellings: str) -> list[str]:
        """Texts, which may be empty; a title stands before its text."""
        found = self.column(*spellings)
        for row, text in enumerate(found, start=1):
            if not isinstance(text, str):
                raise self._wrong(row, spellings[0], text, "a text")
        titles = self.columns.get(TITLE, [None] * len(found))
        return [f"{title} {text}".strip() if title else text for title, text in zip(titles, found, strict=True)]

    def text_lists(self, name: str) -> list[list[str]]:
        """Lists of at least one text."""
        found = self.column(name)
        for row, texts in enumerate(found, start=1):
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise self._wrong(row, name, texts, "a list of texts, at least one")
        return found

    def numbers(self, name: str) -> list[float]:
        """Finite numbers."""
        numbers = []
        for row, value in enumerate(self.column(name), start=1):
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise self._wrong(row, name, value, "a number")
            numbers.append(number)
        return numbers

    def languages(self) -> list[str]:
        """The language of each row, `UNKNOWN_LANGUAGE` where the file does not say it."""
        spelling = next((spelling for spelling in LANGUAGE if spelling in self.columns), None)
        rows = len(next(iter(self.columns.values()), []))
        found = self.columns[spelling] if spelling else [None] * rows
        return [str(language) if language else UNKNOWN_LANGUAGE for language in found]

    def _wrong(self, row: int, name: str, found: object, expected: str) -> DataError:
        return DataError(f"{self.place}, row {row}: found {found!r} as {name}, expected {expected}")


def read_file(uri: str, known: Collection[str]) -> Table:
    """Reads a .parquet or .jsonl file by its path or URI.

    Raises:
        RunError: the URI cannot be opened.
        DataError: another suffix, no such file, or not what its suffix says.
    """
    folder, _, name = uri.rpartition("/")
    if not name.endswith((".parquet", ".jsonl")):
        raise DataError(f"{uri}: expected a .parquet or .jsonl file")
    return read_table(Folder.at(folder or "."), name, known=known)


def read_table(folder: Folder, *names: str, known: Collection[str]) -> Table:
    """Reads the first of these files that is there, and of its columns those of a known name."""
    name = next((name for name in names if folder.exists(name)), None)
    if name is None:
        raise DataError(f"{folder.uri}: no file {' or '.join(names)}")
    place = f"{folder.uri}/{name}"
    if name.endswith(".parquet"):
        return _parquet(folder, name, place, known)
    # Not str.splitlines: it also cuts at U+2028 and its like, which may stand inside a text.
    lines = [line.removesuffix(b"\r") for line in folder.read_bytes(name).split(b"\n")]
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    try:
        decoded = [(number, line.decode("utf-8-sig")) for number, line in rows]
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8: {error.reason}") from None
    return _tsv(decoded, place) if name.endswith(".tsv") else _jsonl(decoded, place, known)


def by_id(place: str, ids: Sequence[str], values: Sequence[ValueT]) -> dict[str, ValueT]:
    """Values by their ids.

    Raises:
        DataError: an id appears twice.
    """
    found = dict(zip(ids, values, strict=True))
    if len(found) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise DataError(f"{place}: id {twice!r} appears twice")
    return found


def _parquet(folder: Folder, name: str, place: str, known: Collection[str]) -> Table:
    try:
        with folder.filesystem.open_input_file(f"{folder.path}/{name}") as stream:
            file = pq.ParquetFile(stream)
            names = file.schema_arrow.names
            columns: Columns = file.read(columns=[column for column in names if column in known]).to_pydict()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{place}: not a parquet file: {error}") from None
    return Table(place, names, columns)


def _jsonl(lines: Lines, place: str, known: Collection[str]) -> Table:
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{place}, line {number}: found {type(row).__name__}, expected an object")
        if HALF_A_PAIR.search(json.dumps(row, ensure_ascii=False) if "\\u" in line else ""):
            raise DataError(f"{place}, line {number}: found half of a surrogate pair, expected whole characters")
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table(place, names, {name: [row.get(name) for row in rows] for name in names if name in known})


def _tsv(lines: Lines, place: str) -> Table:
    rows = [line.split("\t") for _, line in lines]
    header = rows[0] if rows else []
    columns = {
        name: [row[column] if column < len(row) else None for row in rows[1:]]
        for column, name in enumerate(header)
    }
    return Table(place, header, columns)
