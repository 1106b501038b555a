"""Users' tables of evaluation sets, whose columns may be spelled in several ways."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from f2llm_ray.base.errors import DataError
from f2llm_ray.data.language import normal
from f2llm_ray.data.reading.tables import SUFFIXES, Rows, TableFile
from f2llm_ray.data.reading.values import ColumnKind, Fault, unknown_language, wrong_kind
from f2llm_ray.run.folder import Folder

UNKNOWN_LANGUAGE = "und"
"""ISO 639-3 for "undetermined": the language of a text that comes without one."""
LANGUAGE = ("language", "lang")
TWO = re.compile(r"[a-z]{2,3}[-_][a-z]{2,3}")
TITLE, SCORE = "title", "score"

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class EvaluationTable:
    """One file in memory. Methods take the first of the given spellings that the file has.

    Every method raises DataError with the file, the row, what was found and what was expected.
    """

    rows: Rows

    def name_of(self, *spellings: str) -> str | None:
        """The first of these columns that the file has."""
        return next((name for name in spellings if name in self.rows.names), None)

    def values(self, kind: ColumnKind, *spellings: str) -> list[Any]:
        """The values of a column that must be there: none is null, no label empty, no list without a text."""
        name = self.name_of(*spellings)
        if name is None:
            names = sorted(self.rows.names) or "none"
            raise DataError(f"{self.rows.place}: no column {' or '.join(spellings)}; found {names}")
        values: list[Any] = self.rows.column(name, kind).to_pylist()
        for row, value in enumerate(values):
            if value is None or (kind == "label" and not value):
                self.rows.faults.setdefault(row, wrong_kind(name, kind, value))
            elif kind == "texts" and (not value or None in value):
                fault = Fault("no texts", f"{name}: found {value}, expected a list of text, at least one")
                self.rows.faults.setdefault(row, fault)
        self.rows.refuse_faults()
        return values

    def texts(self, *spellings: str) -> list[str]:
        """Texts, which may be empty; a title stands before its text."""
        titles, texts = self._optional(TITLE), self.values("text", *spellings)
        return [f"{title} {text}".strip() if title else text for title, text in zip(titles, texts, strict=True)]

    def languages(self) -> list[str]:
        """The language of each row as training rows carry it, `UNKNOWN_LANGUAGE` where the file does not say it.

        Two of them, such as "de-en" of a bitext, stay as they are.
        """
        said = [(language or "").strip() or UNKNOWN_LANGUAGE for language in self._optional(*LANGUAGE)]
        codes = [language if TWO.fullmatch(language) else normal(language) for language in said]
        for row, code in enumerate(codes):
            if code is None:
                self.rows.faults.setdefault(row, unknown_language("language", said[row]))
        self.rows.refuse_faults()
        return [code or UNKNOWN_LANGUAGE for code in codes]

    def _optional(self, *spellings: str) -> list[str | None]:
        """Texts that may be missing."""
        name = self.name_of(*spellings)
        if name is None:
            return [None] * len(self.rows)
        found: list[str | None] = self.rows.column(name, "text").to_pylist()
        self.rows.refuse_faults()
        return found


def read_table(folder: Folder, *names: str, known: Collection[str]) -> EvaluationTable:
    """Reads the first of these files that is there, and of parquet those columns that have a known name.

    A name without suffix may have any of `SUFFIXES`.

    Raises:
        DataError: no such file, another suffix, or not what its suffix says.
    """
    every = [name + suffix for name in names for suffix in ([""] if "." in name else SUFFIXES)]
    tables = [TableFile.at(folder / name) for name in every]
    table = next((table for name, table in zip(every, tables, strict=True) if folder.exists(name)), None)
    if table is None:
        raise DataError(f"{folder.uri}: no file {' or '.join(every)}")
    rows = table.read_whole(known)
    rows.refuse_faults()
    return EvaluationTable(rows)


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
