"""Lines of users' text files as records: JSON lines, CSV and TSV, all of them UTF-8 with or without a BOM."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from typing import Any

from f2llm_ray.base.errors import DataError
from f2llm_ray.data.reading.values import Fault, not_utf8

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


def cell_records(lines: Iterable[bytes], place: str, *, tabs: bool) -> tuple[list[str], Numbered]:
    """Names of the columns, and a record for each row that is not blank.

    CSV has commas and double quotes, between which a field may hold line ends; TSV has tabs and no quotes.

    Raises:
        DataError: the first line has no names.
    """
    rows = _cell_rows(lines, tabs=tabs)
    number, names = next(rows, (1, []))
    if isinstance(names, Fault):
        raise DataError(f"{place}:{number}: {names.message}")
    if not names:
        raise DataError(f"{place}:1: found a blank line, expected names of columns")
    return names, ((number, _cell_record(names, fields)) for number, fields in rows if fields)


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


def _cell_record(names: list[str], fields: list[str] | Fault) -> Record | Fault:
    if isinstance(fields, Fault):
        return fields
    if len(fields) == len(names):
        return dict(zip(names, fields, strict=True))
    many = "few" if len(fields) < len(names) else "many"
    return Fault(f"too {many} fields", f"found {len(fields)} fields, expected {len(names)}: {names}")


def _cell_rows(lines: Iterable[bytes], *, tabs: bool) -> Iterator[tuple[int, list[str] | Fault]]:
    number, fault = 0, None

    def decoded() -> Iterator[str]:
        nonlocal number, fault
        for number, line in enumerate(lines, start=1):
            data = line.removeprefix(UTF8_MARK) if number == 1 else line
            try:
                yield data.decode("utf-8")
            except UnicodeDecodeError as error:
                fault = (number, not_utf8(error, suffix=" of the line"))
                yield data.decode("utf-8", errors="replace")

    csv.field_size_limit(CSV_FIELD_CHARS)  # documents may exceed the module's 131,072
    name = "TSV" if tabs else "CSV"
    if tabs:
        reader = csv.reader(decoded(), strict=True, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(decoded(), strict=True)
    while True:
        first = number + 1
        fault = None
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, Fault(f"not {name}", f"found a line that is not {name} ({error}), expected {name}")
        else:
            yield fault or (first, fields)
