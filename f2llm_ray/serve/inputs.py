"""The input of bulk embedding: its files, the units they are done in, and the texts and columns of a unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyarrow import csv, fs
from pyarrow import json as pa_json
from pyarrow import parquet as pq

from f2llm_ray.base.errors import DataError, RunError
from f2llm_ray.run.folder import Folder

SUFFIXES = (".parquet", ".jsonl", ".csv")
BLOCK = 64 << 20
"""Bytes of jsonl or csv that are read at a time; a csv row may not be longer."""
LINE_FEED = 10


@dataclass(frozen=True)
class Unit:
    """One shard's worth of input."""

    shard: str
    """File name of the shard."""
    file: str
    """The input file, below the input folder."""
    first_row: int
    """Number of its first row within the file."""
    row_group: int | None = None
    start: int = 0
    """Its first row within the row group (parquet), or its first byte within the file (jsonl)."""
    stop: int = 0
    """The row or byte after its last one; a csv file, which may have line breaks in fields, is a whole unit."""


def find_files(source: Folder) -> dict[str, int]:
    """The input's files with their sizes, in the order of their names; the name of a single file is "".

    Raises:
        RunError: there is none.
    """
    found = source.filesystem.get_file_info(source.path)
    if found.type == fs.FileType.File:
        entries = {"": found.size} if source.path.endswith(SUFFIXES) else {}
    else:
        selector = fs.FileSelector(source.path, allow_not_found=True, recursive=True)
        entries = {
            entry.path[len(source.path) + 1 :]: entry.size
            for entry in source.filesystem.get_file_info(selector)
            if entry.type == fs.FileType.File
            and entry.path.endswith(SUFFIXES)
            and not entry.base_name.startswith((".", "_"))
        }
    if not entries:
        raise RunError(f"{source.uri}: no {', '.join(SUFFIXES)} file there")
    return dict(sorted(entries.items()))


def plan(source: Folder, files: dict[str, int], shard_rows: int) -> list[Unit]:
    """The units of the input, numbered in its order, of at most `shard_rows` rows each (but for csv files).

    A jsonl file is read once for this, to find its lines.

    Raises:
        DataError: a file cannot be read.
    """
    units: list[Unit] = []
    for file in files:
        path = _path(source, file)
        with _reading(source, file):
            if path.endswith(".parquet"):
                parts = _row_groups(source, path, shard_rows)
            elif path.endswith(".jsonl"):
                parts = _lines(source, path, shard_rows)
            else:
                parts = iter([(0, None, 0, 0)])
            units += [Unit(f"shard-{len(units) + n:06d}.parquet", file, *part) for n, part in enumerate(parts)]
    return units


Part = tuple[int, int | None, int, int]


def _row_groups(source: Folder, path: str, shard_rows: int) -> Iterator[Part]:
    metadata = pq.read_metadata(path, filesystem=source.filesystem)
    first_row = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        for start in range(0, rows, shard_rows):
            yield first_row + start, group, start, min(start + shard_rows, rows)
        first_row += rows


def _lines(source: Folder, path: str, shard_rows: int) -> Iterator[Part]:
    """Parts of `shard_rows` lines."""
    first_row = first_byte = lines = read = 0
    with source.filesystem.open_input_stream(path) as stream:
        while block := stream.read(BLOCK):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == LINE_FEED)
            # The line feeds of this block that end a part.
            for at in range(shard_rows - 1 - lines % shard_rows, len(ends), shard_rows):
                stop = read + int(ends[at]) + 1
                yield first_row, None, first_byte, stop
                first_row, first_byte = first_row + shard_rows, stop
            lines += len(ends)
            read += len(block)
    if read > first_byte:
        yield first_row, None, first_byte, read


class Reader:
    """Reads units: their texts, and the columns that go along with the vectors.

    The last row group is kept, since the units of one come one after the other.

    Args:
        source: the input.
        column: the column of the texts.
        id_column: the column of the ids; row numbers within the file where there is none.
        keep: further columns that are handed on.
    """

    def __init__(self, source: Folder, column: str, id_column: str | None, keep: Sequence[str] = ()) -> None:
        self.source, self.column, self.id_column, self.keep = source, column, id_column, tuple(keep)
        self.columns = list(dict.fromkeys([column, *([] if id_column is None else [id_column]), *keep]))
        self._group: tuple[tuple[str, int], pa.Table] | None = None

    def read(self, unit: Unit) -> tuple[pa.LargeStringArray, dict[str, pa.Array]]:
        """Texts of a unit, and its other columns by the names that they have in the shard.

        Raises:
            DataError: the file cannot be read, has no such column, or a row has no text or no id.
        """
        where = _name(self.source, unit.file)
        with _reading(self.source, unit.file):
            table = self._table(unit)
        for name in self.columns:
            if name not in table.column_names:
                raise DataError(f"{where}: it has no column {name!r}")
        text = table[self.column]
        value_type = text.type.value_type if pa.types.is_dictionary(text.type) else text.type
        if not (
            pa.types.is_string(value_type) or pa.types.is_large_string(value_type) or pa.types.is_null(value_type)
        ):
            raise DataError(f"{where}: column {self.column!r} holds {value_type}, expected strings")
        texts = text.cast(pa.large_string()).combine_chunks()
        blank = np.flatnonzero(texts.fill_null("").to_numpy(zero_copy_only=False) == "")
        if len(blank):
            raise DataError(
                f"{where}: row {unit.first_row + blank[0]} (counted from 0) has no text in column {self.column!r}"
            )
        kept = {name: _typed(table[name]) for name in self.keep}
        return texts, {**self._ids(table, unit, where), **kept}

    def _ids(self, table: pa.Table, unit: Unit, where: str) -> dict[str, pa.Array]:
        rows = len(table)
        if self.id_column is None:
            file = unit.file or self.source.path.rpartition("/")[2]
            numbers = np.arange(unit.first_row, unit.first_row + rows)
            return {"file": pa.array([file] * rows, pa.string()), "id": pa.array(numbers, pa.int64())}
        ids = table[self.id_column].combine_chunks()
        missing = np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))
        if len(missing):
            raise DataError(
                f"{where}: row {unit.first_row + missing[0]} (counted from 0) has no id in column "
                f"{self.id_column!r}"
            )
        return {"id": ids}

    def _table(self, unit: Unit) -> pa.Table:
        path = _path(self.source, unit.file)
        if unit.row_group is not None:
            return self._row_group(unit, unit.row_group).slice(unit.start, unit.stop - unit.start)
        # The text column is read as strings in any case: a file of nothing but dates is text all the same.
        if path.endswith(".csv"):
            with self.source.filesystem.open_input_stream(path) as stream:
                return csv.read_csv(
                    stream,
                    read_options=csv.ReadOptions(block_size=BLOCK),
                    parse_options=csv.ParseOptions(newlines_in_values=True),
                    convert_options=csv.ConvertOptions(column_types={self.column: pa.string()}),
                )
        with self.source.filesystem.open_input_file(path) as stream:
            stream.seek(unit.start)
            lines = stream.read(unit.stop - unit.start)
        options = pa_json.ParseOptions(explicit_schema=pa.schema([(self.column, pa.string())]))
        # One block: types are inferred over all the unit's rows.
        return pa_json.read_json(pa.BufferReader(lines), pa_json.ReadOptions(block_size=len(lines) + 1), options)

    def _row_group(self, unit: Unit, group: int) -> pa.Table:
        if self._group is None or self._group[0] != (unit.file, group):
            self._group = None  # the old one goes before the new one comes
            with pq.ParquetFile(_path(self.source, unit.file), filesystem=self.source.filesystem) as file:
                present = [name for name in self.columns if name in file.schema_arrow.names]
                self._group = ((unit.file, group), file.read_row_group(group, columns=present))
        return self._group[1]


def _typed(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece; one of nothing but nulls is taken for strings, as it is in other shards."""
    whole = column.combine_chunks()
    return whole.cast(pa.string()) if pa.types.is_null(whole.type) else whole


@contextmanager
def _reading(source: Folder, file: str) -> Iterator[None]:
    """Turns what pyarrow raises over a file into an error that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{_name(source, file)}: cannot be read: {error}") from None


def _name(source: Folder, file: str) -> str:
    return f"{source.uri}/{file}" if file else source.uri


def _path(source: Folder, file: str) -> str:
    return f"{source.path}/{file}" if file else source.path
