"""Pairs in files: Parquet, JSON lines, CSV, and the layout of the F2LLM-v2 dataset."""

from __future__ import annotations

import csv
import io
import json
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from f2llm_ray.base.errors import DataError
from f2llm_ray.base.section import Content, Output
from f2llm_ray.data.reading.base import BadRow, Piece, SourceBase
from f2llm_ray.data.reading.columns import (
    TABLE_ROWS,
    TEXTS,
    Columns,
    Fault,
    check_names,
    check_schema,
    finish,
    texts_of,
    wrong_kind,
)
from f2llm_ray.data.reading.paths import find_files, store_errors
from f2llm_ray.data.reading.templates import Template, join
from f2llm_ray.run.folder import Folder

CSV_FIELD_CHARS = 100_000_000
READ_BYTES = 1 << 20
UTF8_MARK = b"\xef\xbb\xbf"
NEGATIVE = re.compile(r"negative_(\d+)")

Record = Mapping[str, Any]


class FilesSource(SourceBase):
    """What all sources made of files share."""

    paths: Content[tuple[str, ...]] = Field(min_length=1)
    """Files, folders or globs (*, [abc], ** over folders), local or any URI that pyarrow or fsspec opens, such as
    s3://bucket/folder or hf://datasets/owner/name/file.parquet (which needs huggingface_hub).
    A folder stands for all the files below it with the format's suffix; hidden ones are left out."""

    def files(self, name: str, suffix: str) -> list[str]:
        """The files in the order of `paths`, each once, sorted within a folder or glob.

        Raises:
            DataError: a path that matches nothing, or an empty file.
        """
        found = [file for path in self.paths for file in find_files(path, suffix, f"source {name!r}")]
        return list(dict.fromkeys(found))


class ParquetSource(FilesSource):
    """Parquet files; a row group is a piece, and only the columns that are used are read."""

    format: Output[Literal["parquet"]] = "parquet"
    columns: Columns = Columns()

    def pieces(self, name: str) -> list[Piece]:
        """One per row group; every file's schema is checked here."""
        return [
            piece
            for file in self.files(name, ".parquet")
            for piece in _row_groups(file, self.columns, f"source {name!r}: {file}")
        ]

    def read(self, name: str, piece: Piece, bad_row: BadRow) -> Iterator[pa.Table]:
        """Reads one row group."""
        for first, table in _batches(name, piece, self.columns.used()):
            yield finish(self, name, texts_of(table, self.columns), _row_place(name, piece, first), bad_row)


class F2llmSource(FilesSource):
    """The F2LLM-v2 dataset: one Parquet file per source with query, passage and negative_1 to negative_n.

    There n is 24 for retrieval and clustering and 1 for classification. It may differ between the files of a
    source, and rows may have fewer: a null or blank negative counts as absent.
    """

    format: Output[Literal["f2llm"]] = "f2llm"

    def pieces(self, name: str) -> list[Piece]:
        """One per row group; every file's schema is checked here."""
        return [
            piece
            for file in self.files(name, ".parquet")
            for piece in _row_groups(file, Columns(), f"source {name!r}: {file}", also=NEGATIVE)
        ]

    def read(self, name: str, piece: Piece, bad_row: BadRow) -> Iterator[pa.Table]:
        """Reads one row group."""
        negatives: list[str] = piece["also"]
        for first, table in _batches(name, piece, ["query", "passage", *negatives]):
            texts = texts_of(table, Columns())
            if negatives:
                texts = texts.set_column(2, TEXTS.field("negatives"), _side_by_side(table, negatives))
            yield finish(self, name, texts, _row_place(name, piece, first), bad_row)


class LinesSource(FilesSource):
    """What sources that are read line by line share: a file is a piece."""

    columns: Columns = Columns()

    @abstractmethod
    def records(self, lines: Iterator[bytes], place: str) -> Iterator[tuple[int, Record | Fault]]:
        """Reads the lines of a file as records, each with the number of its first line."""

    def read(self, name: str, piece: Piece, bad_row: BadRow) -> Iterator[pa.Table]:
        """Reads one file, a few thousand rows at a time."""
        file = piece["file"]
        place = f"source {name!r}: {file}"
        unseen = set(self.columns.joined())
        with _opened(file, place) as stream:
            records = self.records(_lines(stream), place)
            empty = True
            while chunk := list(islice(records, TABLE_ROWS)):
                empty = False
                if unseen:
                    unseen.difference_update(*(record for _, record in chunk if not isinstance(record, Fault)))
                yield self._table(name, chunk, place, bad_row)
            if empty:
                raise DataError(f"{place}: found no rows, expected at least one")
        if unseen:  # a row may lack a key of a template, but a key that all rows lack is a slip in the recipe
            raise DataError(f"{place}: no row has the key {min(unseen)!r} of the template, expected it in some")

    def _table(self, name: str, chunk: list[tuple[int, Record | Fault]], place: str, bad_row: BadRow) -> pa.Table:
        named, templates = self.columns.named(), self.columns.templates()
        rows = [_typed(record, named, templates) for _, record in chunk]
        faults = {index: row for index, row in enumerate(rows) if isinstance(row, Fault)}
        texts = pa.Table.from_pylist([{} if isinstance(row, Fault) else row for row in rows], schema=TEXTS)
        return finish(self, name, texts, lambda row: f"{place}:{chunk[row][0]}", bad_row, faults)


class JsonlSource(LinesSource):
    """JSON lines: one object per line."""

    format: Output[Literal["jsonl"]] = "jsonl"

    def pieces(self, name: str) -> list[Piece]:
        """One per file."""
        return [{"file": file} for file in self.files(name, ".jsonl")]

    def records(self, lines: Iterator[bytes], place: str) -> Iterator[tuple[int, Record | Fault]]:
        """One per line that is not blank."""
        del place
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _json_record(line)


class CsvSource(LinesSource):
    """CSV: comma-separated, double quotes, column names in the first line."""

    format: Output[Literal["csv"]] = "csv"

    def pieces(self, name: str) -> list[Piece]:
        """One per file; every file's header is checked here."""
        files = self.files(name, ".csv")
        for file in files:
            place = f"source {name!r}: {file}"
            with _opened(file, place) as stream:
                check_names(_csv_header(_Decoder(_lines(stream)), place)[1], self.columns, place)
        return [{"file": file} for file in files]

    def records(self, lines: Iterator[bytes], place: str) -> Iterator[tuple[int, Record | Fault]]:
        """One per row; a quoted field may hold line ends, so a row may span lines."""
        decoder = _Decoder(lines)
        reader, names = _csv_header(decoder, place)
        while True:
            number = decoder.number + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                decoder.take_fault()
                yield number, Fault("not CSV", f"found a line that is not CSV ({error}), expected CSV")
                continue
            undecoded = decoder.take_fault()
            if undecoded is not None:
                yield undecoded
            elif fields:
                yield number, _csv_record(names, fields, self.columns)


@contextmanager
def _opened(file: str, place: str) -> Iterator[io.BufferedReader]:
    folder = Folder.at(file)
    try:
        with io.BufferedReader(folder.filesystem.open_input_stream(folder.path), READ_BYTES) as stream:
            yield stream
    except store_errors() as error:
        raise DataError(f"{place}: cannot be read: {error}") from None


@contextmanager
def _parquet(file: str, place: str) -> Iterator[pq.ParquetFile]:
    folder = Folder.at(file)
    try:
        with folder.filesystem.open_input_file(folder.path) as stream, pq.ParquetFile(stream) as parquet:
            yield parquet
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{place}: found a damaged file or another format, expected Parquet: {error}") from None
    except store_errors() as error:
        raise DataError(f"{place}: cannot be read: {error}") from None


def _row_groups(file: str, columns: Columns, place: str, also: re.Pattern[str] | None = None) -> list[Piece]:
    with _parquet(file, place) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    check_schema(schema, columns, place)
    piece: Piece = {"file": file}
    if also is not None:
        numbers = sorted(int(match[1]) for match in map(also.fullmatch, schema.names) if match)
        piece["also"] = [f"negative_{number}" for number in numbers]
        for extra in piece["also"]:
            check_schema(schema, Columns(language=extra), place)
    if not any(sizes):
        raise DataError(f"{place}: found no rows, expected at least one")
    firsts = np.cumsum([0, *sizes]).tolist()
    return [{**piece, "row_group": group, "first_row": firsts[group]} for group, size in enumerate(sizes) if size]


def _batches(name: str, piece: Piece, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """The tables of a row group, each with the number of its first row in the file."""
    first = piece["first_row"]
    with _parquet(piece["file"], f"source {name!r}: {piece['file']}") as parquet:
        for batch in parquet.iter_batches(TABLE_ROWS, row_groups=[piece["row_group"]], columns=columns):
            yield first, pa.Table.from_batches([batch])
            first += len(batch)


def _row_place(name: str, piece: Piece, first: int) -> Callable[[int], str]:
    return lambda row: f"source {name!r}: {piece['file']}: row {first + row} (counted from 0)"


def _side_by_side(table: pa.Table, columns: list[str]) -> pa.ListArray:
    """Several text columns as one column of lists, nulls included."""
    rows, width = len(table), len(columns)
    stacked = pa.concat_arrays([chunk for c in columns for chunk in table.column(c).cast(pa.string()).chunks])
    row_by_row = np.arange(rows * width).reshape(width, rows).T.ravel()
    offsets = np.arange(0, rows * width + 1, width, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), stacked.take(pa.array(row_by_row)))


def _lines(stream: Iterable[bytes]) -> Iterator[bytes]:
    for number, line in enumerate(stream):
        yield line.removeprefix(UTF8_MARK) if number == 0 else line


def _not_utf8(error: UnicodeDecodeError) -> Fault:
    byte = error.object[error.start]
    return Fault("not UTF-8", f"found byte 0x{byte:02x} at byte {error.start + 1} of the line, expected UTF-8")


def _typed(record: Record | Fault, named: Mapping[str, str], templates: Mapping[str, Template]) -> Record | Fault:
    """A record's fields as a row of `TEXTS`, or what is wrong with them."""
    if isinstance(record, Fault):
        return record
    row: dict[str, Any] = {}
    for field, column in named.items():
        if column not in record:
            return Fault(f"no {field}", f"found no key {column!r}, expected it beside {list(record)}")
        row[field] = record[column]
        fault = _value_fault(field, column, record[column])
        if fault is not None:
            return fault
    for field, parts in templates.items():
        for column in (column for _, column in parts if column is not None):
            fault = _value_fault(field, column, record.get(column))
            if fault is not None:
                return fault
        row[field] = join(record, parts)
    return row


def _value_fault(field: str, column: str, value: Any) -> Fault | None:
    if not (_is_texts(value) if field == "negatives" else isinstance(value, str | None)):
        return wrong_kind(field, column, value)
    if not all(map(_is_unicode, value if isinstance(value, list) else [value])):
        return Fault("not UTF-8", f"{column}: found half of a surrogate pair, expected UTF-8 text")
    return None


def _is_texts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(text, str | None) for text in value))


def _is_unicode(text: str | None) -> bool:
    """Whether a text can be written as UTF-8: a JSON escape can hold half of a surrogate pair."""
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _json_record(line: bytes) -> Record | Fault:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _not_utf8(error)
    except (ValueError, RecursionError) as error:
        return Fault("not JSON", f"found a line that is not JSON ({error}), expected a JSON object")
    if not isinstance(value, dict):
        return Fault("not a JSON object", f"found {type(value).__name__}, expected a JSON object")
    return value


class _Decoder(Iterator[str]):
    """Lines as text for the CSV reader, which needs them one by one; remembers the last bad one."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self.lines = lines
        self.number = 0
        self.fault: tuple[int, Fault] | None = None

    def __next__(self) -> str:
        line = next(self.lines)
        self.number += 1
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fault = (self.number, _not_utf8(error))
            return line.decode("utf-8", errors="replace")

    def take_fault(self) -> tuple[int, Fault] | None:
        """The bad line since the last call, if any."""
        fault, self.fault = self.fault, None
        return fault


def _csv_header(decoder: _Decoder, place: str) -> tuple[Iterator[list[str]], list[str]]:
    """The reader of a CSV file, past its header, and the column names."""
    csv.field_size_limit(CSV_FIELD_CHARS)  # documents may exceed the module's 131,072
    reader = csv.reader(decoder, strict=True)
    try:
        names = next(reader, None)
    except csv.Error as error:
        raise DataError(f"{place}:1: found a line that is not CSV ({error}), expected column names") from None
    fault = decoder.take_fault()
    if fault is not None:
        raise DataError(f"{place}:{fault[0]}: {fault[1].message}")
    if not names:
        raise DataError(f"{place}:1: found a blank line, expected column names")
    return reader, names


def _csv_record(names: list[str], fields: list[str], columns: Columns) -> Record | Fault:
    if len(fields) != len(names):
        many = "few" if len(fields) < len(names) else "many"
        return Fault(f"too {many} fields", f"found {len(fields)} fields, expected {len(names)}: {names}")
    record: dict[str, Any] = dict(zip(names, fields, strict=True))
    if columns.negatives is not None:
        cell = record[columns.negatives]
        try:
            record[columns.negatives] = json.loads(cell) if cell.strip() else None
        except (ValueError, RecursionError):
            return wrong_kind("negatives", columns.negatives, cell)
    return record
