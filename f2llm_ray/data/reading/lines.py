"""Lines of users' text files as records: JSON lines, CSV and TSV, all of them UTF-8 with or without a BOM."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from f2llm_ray.base.errors import DataError
from f2llm_ray.data.reading.values import Fault, not_utf8

LineFormat = Literal["jsonl", "csv", "tsv"]
Record = dict[str, Any]
Numbered = Iterator[tuple[int, Record | Fault]]
"""Records, or what is wrong with them, each with the number of its first line, counted from 1."""

CSV_FIELD_CHARS = 100_000_000
UTF8_MARK = b"\xef\xbb\xbf"


def json_records(lines: Iterable[bytes], first: int = 1) -> Numbered:
    """One per line that is not blank; `first` is the number of the first line."""
    for number, line in enumerate(lines, start=first):
        data = line.removeprefix(UTF8_MARK) if number == 1 else line
        if data.strip():
            yield number, _json_record(data)


class CellLines:
    """The lines of a CSV file (commas, double quotes) or TSV file (tabs, no quotes); the first has the names.

    Raises:
        DataError: the first line has no names.
    """

    def __init__(self, lines: Iterable[bytes], place: str, *, tabs: bool = False) -> None:
        csv.field_size_limit(CSV_FIELD_CHARS)  # documents may exceed the module's 131,072
        self._lines, self._number = iter(lines), 0
        self._fault: tuple[int, Fault] | None = None
        form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
        self._reader, self._format = csv.reader(self._decoded(), strict=True, **form), "TSV" if tabs else "CSV"
        number, names = next(self._rows(), (1, []))
        if isinstance(names, Fault):
            raise DataError(f"{place}:{number}: {names.message}")
        if not names:
            raise DataError(f"{place}:1: found a blank line, expected names of columns")
        self.names = names

    def records(self) -> Numbered:
        """One per row that is not blank; a quoted field may hold line ends, so a row may span lines."""
        for number, fields in self._rows():
            if isinstance(fields, Fault):
                yield number, fields
            elif len(fields) == len(self.names):
                yield number, dict(zip(self.names, fields, strict=True))
            elif fields:
                many = "few" if len(fields) < len(self.names) else "many"
                found = f"found {len(fields)} fields, expected {len(self.names)}: {self.names}"
                yield number, Fault(f"too {many} fields", found)

    def _rows(self) -> Iterator[tuple[int, list[str] | Fault]]:
        while True:
            number = self._number + 1
            try:
                fields: list[str] | Fault = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                message = f"found a line that is not {self._format} ({error}), expected {self._format}"
                fields = Fault(f"not {self._format}", message)
            if self._fault is not None and not isinstance(fields, Fault):
                number, fields = self._fault
            self._fault = None
            yield number, fields

    def _decoded(self) -> Iterator[str]:
        """The lines one by one, as the CSV reader asks for them; remembers the last one that is not UTF-8."""
        for line in self._lines:
            self._number += 1
            data = line.removeprefix(UTF8_MARK) if self._number == 1 else line
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                self._fault = (self._number, not_utf8(error, suffix=" of the line"))
                text = data.decode("utf-8", errors="replace")
            yield text


def _json_record(line: bytes) -> Record | Fault:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return not_utf8(error, suffix=" of the line")
    except (ValueError, RecursionError) as error:
        return Fault("not JSON", f"found a line that is not JSON ({error}), expected a JSON object")
    if not isinstance(value, dict):
        return Fault("not a JSON object", f"found {type(value).__name__}, expected a JSON object")
    return value
