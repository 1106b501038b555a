"""The reader of users' tables: parquet, JSON lines, CSV and TSV, by path or URI, a few thousand rows at a time.

Training data, evaluation sets and bulk embedding read through it. A file, `TableFile`, is cut into `FilePart`s,
and a part is read as `Rows`, whose columns are checked when they are asked for.
"""

from __future__ import annotations

import codecs
import difflib
import io
import lzma
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import IO, Any, Literal, cast, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from f2llm_ray.base.errors import DataError
from f2llm_ray.data.ragged import Ints
from f2llm_ray.data.reading.lines import (
    UTF8,
    UTF8_MARK,
    Dialect,
    Numbered,
    Record,
    array_records,
    cell_records,
    check_names,
    json_records,
)
from f2llm_ray.data.reading.paths import listed, plain_name, store_errors
from f2llm_ray.data.reading.values import (
    ColumnKind,
    Fault,
    Faults,
    ReadItem,
    check_type,
    from_arrow,
    from_cells,
    from_python,
    is_list,
)
from f2llm_ray.run.folder import Folder

Format = Literal["parquet", "jsonl", "json", "csv", "tsv"]
SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv")
"""By which a table is known; .json files are read where a recipe names the format, since many are no tables."""
TABLE_ROWS = 4_096
"""Rows per table: with 24 negatives of 4 kB each a table stays below the 2 GB that Arrow's offsets reach."""
READ_BYTES = 1 << 20
WIDE = ("utf-16", "utf-32")
"""Encodings in which a line does not end in one byte."""


@dataclass
class Rows:
    """Some rows of a table that follow each other: an Arrow table, or a record for each row."""

    place: str
    """The file, for messages."""
    names: list[str]
    """The columns; of JSON lines, all keys that some row here has."""
    content: pa.Table | list[Record]
    first: int = 0
    """Number within the file of the first row of an Arrow table."""
    lines: list[int] = field(default_factory=list)
    """Number of the first line of each record, from 1."""
    cells: bool = False
    """Whether records are of CSV, where every value is text."""
    faults: Faults = field(default_factory=dict)
    """Rows with something wrong: what was no record, and what `column` found since; the first fault of each."""
    origin: Ints | None = None
    """After `spread`, the record of each row."""

    def __len__(self) -> int:
        return len(self.content)

    def at(self, row: int) -> str:
        """Names a row for a person: by its line where the file has lines, by its number within parquet."""
        row = row if self.origin is None else int(self.origin[row])
        if self.lines:
            return f"{self.place}:{self.lines[row]}"
        return f"{self.place}: row {self.first + row} (counted from 0)"

    def spread(self, origin: Ints) -> None:
        """Makes several rows of some records; faults of a record are those of each of its rows."""
        self.origin = origin
        if self.faults:
            self.faults = {row: self.faults[old] for row, old in enumerate(origin.tolist()) if old in self.faults}

    def has_lists(self, name: str) -> bool:
        """Whether some row has a list in a column."""
        if isinstance(self.content, pa.Table):
            known = name in self.content.column_names
            return is_list(self.content.schema.field(name).type) if known else "." in name
        return not self.cells and any(isinstance(walked(record, name), list) for record in self.content)

    def column(
        self,
        name: str,
        kind: ColumnKind,
        *,
        field: str | None = None,
        required: bool = False,
        item: ReadItem | None = None,
    ) -> pa.Array:
        """A column as an array of `values.TYPES`; it is null in rows with a fault, which go to `faults`.

        Args:
            name: the column.
            kind: what it holds.
            field: what rows call it, where the reasons of faults shall say that.
            required: every record must have the key, though its value may be null.
            item: what an object in a list of texts reads.

        Raises:
            DataError: no row has the column, or it is of another kind as a whole.
        """
        if isinstance(self.content, pa.Table) and name not in self.content.column_names and "." in name:
            root = name.partition(".")[0]
            check_columns(self.content.schema, [(root, "any")], self.place)
            values = [walked({root: value}, name) for value in self.content[root].to_pylist()]
            array, faults = from_python(values, name, kind, field, item)
        elif isinstance(self.content, pa.Table):
            check_columns(self.content.schema, [(name, kind)], self.place)
            array, faults = from_arrow(self.content[name], name, kind, field, item)
        else:
            nested = "." in name
            values = [walked(record, name) if nested else record.get(name) for record in self.content]
            try:
                array, faults = (from_cells if self.cells else from_python)(values, name, kind, field, item)
            except (pa.ArrowException, OverflowError) as error:
                raise DataError(f"{self.place}: column {name!r}: found values of several types: {error}") from None
            if required:
                faults |= {
                    row: Fault(f"no {field or name}", f"found no key {name!r}, expected it beside {list(record)}")
                    for row, record in enumerate(self.content)
                    if name.partition(".")[0] not in record and name not in record
                }
        self.faults = {**faults, **self.faults}
        return array

    def slice(self, start: int, stop: int | None) -> Rows:
        """Some rows of an Arrow table, none of whose columns has been asked for yet."""
        content = self.content[start:stop]
        return Rows(self.place, self.names, content, self.first + start)

    def refuse_faults(self) -> None:
        """Raises a DataError for the first malformed row, if there is one."""
        malformed = [row for row, fault in self.faults.items() if fault.malformed]
        if malformed:
            row = min(malformed)
            raise DataError(f"{self.at(row)}: {self.faults[row].message}")


@dataclass(frozen=True)
class FilePart:
    """A part of a file that is read at a time."""

    first_row: int = 0
    """Number of its first row within the file; of JSON lines, of its first line, counted from 0."""
    row_group: int | None = None
    start: int = 0
    """Its first row within the row group (parquet), or its first byte within the file (JSON lines)."""
    stop: int | None = None
    """The row or byte after its last one; None for all that follow."""


@dataclass(frozen=True)
class TableFile:
    """A user's file with a table. Methods raise DataError where it cannot be read or is of another format."""

    file: Folder
    format: Format
    place: str
    """What messages call it."""
    dialect: Dialect | None = None
    """How cells are written; None is as CSV and TSV are by default."""

    @classmethod
    def at(cls, file: Folder) -> TableFile:
        """A file whose suffix says its format.

        Raises:
            DataError: another suffix.
        """
        for name in get_args(Format):
            if f".{name}" in SUFFIXES and plain_name(file.path).endswith(f".{name}"):
                return cls(file, name, file.uri)
        raise DataError(f"{file.uri}: expected a {listed(SUFFIXES)} file")

    def schema(self) -> pa.Schema | None:
        """The columns with their types, null in CSV and TSV, which have none; None for JSON."""
        if self.format == "parquet":
            with self._parquet() as file:
                check_names(file.schema_arrow.names, self.place)
                return file.schema_arrow
        if self.format in ("jsonl", "json"):
            return None
        with self.stream(FilePart()) as stream:
            names, _ = self._cells(stream)
        return pa.schema([(name, pa.null()) for name in names])

    def names(self) -> list[str]:
        """The columns, by the head of the file; of JSON lines, all keys of its first `TABLE_ROWS` rows.

        There are none where a file of JSON has no rows; where none of the first rows is one, the first is refused.
        """
        schema = self.schema()
        if schema is not None:
            return list(schema.names)
        rows = next(self.read(FilePart(), ()), None)
        if rows is not None and not rows.names:
            rows.refuse_faults()
        return [] if rows is None else rows.names

    def parts(self, max_rows: int | None = None) -> list[FilePart]:
        """The parts of the file in their order.

        Parquet is cut into row groups, and JSON lines into runs of lines, for which the file is read once. CSV and
        TSV files are one part, since a field may have line ends, and so is what is compressed.

        Args:
            max_rows: rows, or lines, of a part at most; None cuts no row groups and leaves text files whole.
        """
        if self.format == "parquet":
            return list(self._row_groups(max_rows))
        lines = self.format == "jsonl" and plain_name(self.file.path) == self.file.path  # else nothing to seek in
        return [FilePart()] if max_rows is None or not lines else list(self._runs_of_lines(max_rows))

    def read(self, part: FilePart, columns: Collection[str]) -> Iterator[Rows]:
        """Reads a row group, or a text file, `TABLE_ROWS` at a time; of parquet only these columns."""
        if part.row_group is None:
            yield from self._records(part, TABLE_ROWS)
            return
        first = part.first_row
        with self._parquet() as file:
            names = file.schema_arrow.names
            for batch in file.iter_batches(
                TABLE_ROWS, row_groups=[part.row_group], columns=_among(names, columns)
            ):
                yield Rows(self.place, names, pa.Table.from_batches([batch]), first)
                first += len(batch)

    def read_whole(self, columns: Collection[str], part: FilePart | None = None) -> Rows:
        """Reads at once a file, the whole row group that a part is of, or a run of lines."""
        if self.format != "parquet":
            found = next(self._records(part or FilePart(), None), None)
            return Rows(self.place, (self.schema() or pa.schema([])).names, []) if found is None else found
        with self._parquet() as file:
            names = file.schema_arrow.names
            if part is None or part.row_group is None:
                return Rows(self.place, names, file.read(_among(names, columns)))
            table = file.read_row_group(part.row_group, _among(names, columns))
            return Rows(self.place, names, table, part.first_row - part.start)

    def _json(self, data: bytes) -> tuple[Numbered, bool]:
        """The records of a .json file, an array or lines, and whether they are numbered by line."""
        if data.removeprefix(UTF8_MARK).lstrip().startswith(b"["):
            lines = data.splitlines()
            first = lines[0].strip() if lines else b""
            if not (len(lines) > 1 and first.endswith(b"]")):  # else an array per line
                return array_records(data, self.place), False
        return json_records(io.BytesIO(data)), True

    def _cells(self, stream: Iterable[bytes]) -> tuple[list[str], Numbered]:
        """The names of the columns of CSV or TSV, and its records."""
        tabs = Dialect(delimiter="\t", quotes=False)
        dialect = self.dialect or (tabs if self.format == "tsv" else Dialect())
        if codecs.lookup(dialect.encoding).name.startswith(WIDE):
            decoded = io.TextIOWrapper(cast(IO[bytes], stream), dialect.encoding, errors="replace", newline="\n")
            stream, dialect = (line.encode() for line in decoded), replace(dialect, encoding=UTF8)
        return cell_records(stream, self.place, dialect)

    @contextmanager
    def _parquet(self) -> Iterator[pq.ParquetFile]:
        """The file, open as parquet."""
        try:
            with self.file.filesystem.open_input_file(self.file.path) as stream, pq.ParquetFile(stream) as file:
                yield file
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{self.place}: found a damaged file or another format, expected Parquet: {error}"
            ) from None
        except store_errors() as error:
            raise DataError(f"{self.place}: cannot be read: {error}") from None

    @contextmanager
    def stream(self, part: FilePart) -> Iterator[Iterable[bytes]]:
        """The bytes of a part, which are iterated by line."""
        try:
            if part.stop is None:
                with ExitStack() as opened:
                    stream = opened.enter_context(self.file.filesystem.open_input_stream(self.file.path))
                    if self.file.path.endswith(".xz"):  # the one of these that Arrow does not know
                        stream = opened.enter_context(lzma.open(stream))
                    yield opened.enter_context(io.BufferedReader(stream, READ_BYTES))
                return
            with self.file.filesystem.open_input_file(self.file.path) as file:
                file.seek(part.start)
                data = file.read(part.stop - part.start)
            yield io.BytesIO(data)
        except store_errors(lzma.LZMAError, EOFError) as error:
            raise DataError(f"{self.place}: cannot be read: {error}") from None

    def _records(self, part: FilePart, rows: int | None) -> Iterator[Rows]:
        with self.stream(part) as stream:
            names: list[str] | None = None
            numbered = True
            if self.format == "jsonl":
                found: Numbered = json_records(stream, part.first_row + 1)
            elif self.format == "json":
                found, numbered = self._json(b"".join(stream))
            else:
                names, found = self._cells(stream)
            while chunk := list(islice(found, rows)):
                faults = {row: record for row, (_, record) in enumerate(chunk) if isinstance(record, Fault)}
                records: list[Record] = [{} if isinstance(record, Fault) else record for _, record in chunk]
                keys = list(dict.fromkeys(chain.from_iterable(records))) if names is None else names
                first, lines = chunk[0][0], [number for number, _ in chunk] if numbered else []
                cells = names is not None
                yield Rows(self.place, keys, records, first, lines=lines, cells=cells, faults=faults)

    def _row_groups(self, max_rows: int | None) -> Iterator[FilePart]:
        with self._parquet() as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        first_row = 0
        for group, size in enumerate(sizes):
            step = max_rows or max(size, 1)
            for start in range(0, size, step):
                yield FilePart(first_row + start, group, start, min(start + step, size))
            first_row += size

    def _runs_of_lines(self, count: int) -> Iterator[FilePart]:
        first_row = start = 0
        with self.stream(FilePart()) as lines:
            while size := sum(map(len, islice(lines, count))):
                yield FilePart(first_row, None, start, start + size)
                first_row, start = first_row + count, start + size


def walked(record: Record, name: str) -> Any:
    """The value of a key, or of a path into what is nested, such as "answers.text.0"; None where there is none."""
    if name in record or "." not in name:
        return record.get(name)
    value: Any = record
    for part in name.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def check_columns(schema: pa.Schema, columns: Iterable[tuple[str, ColumnKind]], place: str) -> None:
    """Checks that a table has columns of these kinds.

    Raises:
        DataError: a column is missing (the message lists those that are there) or has another type.
    """
    for column, kind in columns:
        root = column.partition(".")[0]
        if column not in schema.names and root in schema.names and pa.types.is_nested(schema.field(root).type):
            continue  # a path into it
        if column not in schema.names:
            raise no_column(place, column, schema.names)
        check_type(schema.field(column).type, column, kind, place)


def require_columns(columns: Iterable[str], names: Sequence[str], place: str) -> None:
    """Raises DataError for the first column that a table has neither by its name nor as the begin of a path."""
    for column in columns:
        if column not in names and column.partition(".")[0] not in names:
            raise no_column(place, column, names)


def no_column(place: str, column: str, names: Sequence[str]) -> DataError:
    """The error of a column that a table does not have; it lists those that are there, and the one most alike."""
    near = difflib.get_close_matches(column, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return DataError(f"{place}: no column {column!r}; the columns are {list(names)}{hint}")


def _among(names: list[str], columns: Collection[str]) -> list[str]:
    wanted = roots(columns)
    return [name for name in names if name in wanted]


def roots(columns: Iterable[str]) -> set[str]:
    """The columns themselves, and those that paths begin with."""
    return {name for column in columns for name in (column, column.partition(".")[0])}
