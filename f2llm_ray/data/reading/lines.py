"""Lines of users' text files as records: JSON lines, and tables of cells (CSV, TSV)."""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from f2llm_ray.base.errors import DataError
from f2llm_ray.data.reading.values import Fault, not_utf8

Record = dict[str, Any]
Numbered = Iterator[tuple[int, Record | Fault]]
"""Records, or what is wrong with them, each with the number of its first line, counted from 1."""

CSV_FIELD_CHARS = 100_000_000
UTF8_MARK = b"\xef\xbb\xbf"
UTF8 = "utf-8"
DELIMITERS = (",", ";", "|", "\t")
"""Those that are looked for where the recipe names none."""
SAMPLE_LINES = 20
"""Lines of a file without a header that its delimiter is found by."""
SWALLOWED = 4
"""Lines inside one field which, if each reads like a row, tell of a quote that nobody closed:
of a text over several lines, hardly every one has as many delimiters as a row."""
LOOK_EVERY = 256
"""Lines of one row after which it is looked whether they read like rows."""


@dataclass(frozen=True)
class Dialect:
    """How cells are written."""

    delimiter: str | None = None
    """None where it is found by the first lines."""
    quotes: bool = True
    """Whether a field in double quotes may hold delimiters and line ends."""
    names: tuple[str, ...] | None = None
    """The names of the columns where the file does not begin with them; () numbers them from 0."""
    encoding: str = UTF8


class DuplicateKeyError(ValueError):
    """A key stands twice in a JSON object."""


def array_records(data: bytes, place: str) -> Numbered:
    """The objects of a file that is one JSON array, numbered from 0.

    Raises:
        DataError: it is none.
    """
    try:
        values = json.loads(data.removeprefix(UTF8_MARK).decode("utf-8"), object_pairs_hook=_object)
    except DuplicateKeyError as error:
        raise DataError(f"{place}: found the key {error} twice in one object, expected each once") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: found a file that is not JSON: {error}") from None
    return ((number, _as_record(value)) for number, value in enumerate(values))


def json_records(lines: Iterable[bytes], first: int = 1) -> Numbered:
    """One per line that is not blank; `first` is the number of the first line."""
    for number, line in enumerate(lines, start=first):
        data = line.removeprefix(UTF8_MARK) if number == 1 else line
        if data.strip():
            yield number, _json_record(data)


def cell_records(lines: Iterable[bytes], place: str, dialect: Dialect) -> tuple[list[str], Numbered]:
    """Names of the columns, and a record for each row that is not blank.

    A row whose quote was never closed is a fault of its first line, and the lines after it are read as rows.

    Raises:
        DataError: the first line has no names, or a name twice.
    """
    cells = _Cells(lines, dialect)
    rows = iter(cells)
    if dialect.names is not None:
        names = list(dialect.names) or [str(number) for number in range(cells.width)]
    else:
        number, found = next(rows, (1, []))
        if isinstance(found, Fault):
            raise DataError(f"{place}:{number}: {found.message}")
        if not found:
            raise DataError(f"{place}:1: found a blank line, expected names of columns")
        names = found
    check_names(names, f"{place}:1")
    cells.width = len(names)
    return names, ((number, _cell_record(names, fields)) for number, fields in rows if fields)


def _json_record(line: bytes) -> Record | Fault:
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return not_utf8(error, suffix=" of the line")
    except DuplicateKeyError as error:
        return Fault("a key twice", f"found the key {error} twice in one object, expected each once")
    except (ValueError, RecursionError) as error:
        return Fault("not JSON", f"found a line that is not JSON ({error}), expected a JSON object")
    return _as_record(value)


def _as_record(value: Any) -> Record | Fault:
    """An object as it is, and an array as one with the places of its entries for keys."""
    if isinstance(value, list):
        return {str(place): entry for place, entry in enumerate(value)}
    if not isinstance(value, dict):
        return Fault("not a JSON object", f"found {type(value).__name__}, expected a JSON object or array")
    return value


def _object(pairs: list[tuple[str, Any]]) -> Record:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DuplicateKeyError(repr(next(key for key in keys if keys.count(key) > 1)))
    return found


def _cell_record(names: list[str], fields: list[str] | Fault) -> Record | Fault:
    if isinstance(fields, Fault):
        return fields
    if len(fields) == len(names):
        return dict(zip(names, fields, strict=True))
    many = "few" if len(fields) < len(names) else "many"
    return Fault(f"too {many} fields", f"found {len(fields)} fields, expected {len(names)}: {names}")


class _SwallowedError(Exception):
    """The lines of the row that is being read are rows themselves."""


class _Cells:
    """Rows of cells with the number of their first line; what is wrong with one is a `Fault`.

    Args:
        lines: the lines of the file, undecoded.
        dialect: how they are written.
    """

    def __init__(self, lines: Iterable[bytes], dialect: Dialect) -> None:
        self.dialect = dialect
        self._coming = enumerate(lines, start=1)
        self._back: deque[tuple[int, bytes]] = deque()
        """Lines that were looked at, or given back by a row with a fault; they come again."""
        self._taken: list[tuple[int, bytes]] = []
        """The lines of the row that is being read."""
        self._fault: Fault | None = None
        self._back.extend(islice(self._coming, SAMPLE_LINES))
        sample = [self._decoded(*line) for line in self._back]
        self._fault = None
        headed = dialect.names is None
        self.delimiter = dialect.delimiter or _delimiter(sample, headed=headed, quotes=dialect.quotes)
        self.width = len(self._cut(sample[0]) or ()) if sample else 0
        """Number of columns."""

    def __iter__(self) -> Iterator[tuple[int, list[str] | Fault]]:
        csv.field_size_limit(CSV_FIELD_CHARS)  # documents may exceed the module's 131,072
        reader = self._reader(self._lines())
        name = "CSV" if self.dialect.quotes else "TSV"
        while True:
            self._taken.clear()
            self._fault = None
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                found = f"found a line that is not {name} ({error}), expected {name}"
                yield self._give_back(Fault(f"not {name}", found))
            except _SwallowedError:
                yield self._give_back(self._not_closed())
            else:
                if not self._swallowed(whole=len(fields) == self.width):
                    yield self._taken[0][0], self._fault or fields
                    continue
                yield self._give_back(self._not_closed())
            reader = self._reader(self._lines())

    def _lines(self) -> Iterator[str]:
        while True:
            if self._back:
                number, line = self._back.popleft()
            else:
                number, line = next(self._coming, (0, b""))
                if not number:
                    return
            self._taken.append((number, line))
            if len(self._taken) % LOOK_EVERY == 0 and self._swallowed():
                raise _SwallowedError
            yield self._decoded(number, line)

    def _decoded(self, number: int, line: bytes) -> str:
        encoding = self.dialect.encoding
        data = line.removeprefix(UTF8_MARK) if number == 1 and encoding == UTF8 else line
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            self._fault = not_utf8(error, suffix=" of the line", encoding=encoding)
            return data.decode(encoding, errors="replace")

    def _swallowed(self, *, whole: bool = True) -> bool:
        """Whether each line inside the row, its first and last left out, reads like a row of the table.

        Of a row that is not whole, having another number of fields, it is enough that each line after the first
        does: it is a fault either way, and those lines would be lost with it.
        """
        count, least = (len(self._taken) - 2, SWALLOWED) if whole else (len(self._taken) - 1, 1)
        if self.width < 2 or count < least:
            return False
        inside, fault = islice(self._taken, 1, 1 + count), self._fault
        alike = all(len(self._cut(self._decoded(*line)) or ()) == self.width for line in inside)
        self._fault = fault
        return alike

    def _give_back(self, fault: Fault) -> tuple[int, Fault]:
        """Takes the first line of the row for broken, and lets the others come again."""
        self._back.extendleft(reversed(self._taken[1:]))
        return self._taken[0][0], fault

    def _not_closed(self) -> Fault:
        return Fault(
            "a quote that is not closed",
            f"found a quote after which {len(self._taken):,} lines or more would be one row, though each reads "
            f"like one of {self.width} fields; expected the quote to be closed in its line",
        )

    def _cut(self, line: str) -> list[str] | None:
        """The fields of one line by itself, None where it is no row."""
        try:
            return next(self._reader([line]), None)
        except csv.Error:
            return None

    def _reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        return _reader(lines, self.delimiter, quotes=self.dialect.quotes, strict=True)


def _reader(lines: Iterable[str], delimiter: str, *, quotes: bool, strict: bool) -> Iterator[list[str]]:
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    return csv.reader(lines, strict=strict, delimiter=delimiter, quoting=quoting)


def _delimiter(lines: list[str], *, headed: bool, quotes: bool) -> str:
    """The delimiter of a file: that which names the most columns or, without names, cuts all lines alike."""

    def widths(delimiter: str) -> list[int]:
        try:
            return [len(row) for row in _reader(lines, delimiter, quotes=quotes, strict=False) if row]
        except csv.Error:
            return [0]

    found = {delimiter: widths(delimiter) or [0] for delimiter in DELIMITERS}
    if headed:
        return max(DELIMITERS, key=lambda delimiter: found[delimiter][0])
    alike = [delimiter for delimiter in DELIMITERS if found[delimiter][0] > 1 and len(set(found[delimiter])) == 1]
    # The last ones are the rarest in texts: where they cut all lines alike, that is no chance.
    return alike[-1] if alike else DELIMITERS[0]


def check_names(names: Sequence[str], place: str) -> None:
    """Refuses columns of which two have one name, with a `DataError`."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{place}: found the column {twice[0]!r} twice, expected each name once")
