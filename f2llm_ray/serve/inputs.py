"""The input of bulk embedding: its files, the units they are done in, and the texts and ids of a unit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, fs
from pyarrow import json as pa_json
from pyarrow import parquet as pq

from f2llm_ray.errors import DataError, RunError
from f2llm_ray.run import Folder

SUFFIXES = (".parquet", ".jsonl", ".csv")
BLOCK = 64 << 20
"""Bytes that pyarrow parses at a time; a row may not be longer."""


@dataclass(frozen=True)
class Unit:
    """One shard's worth of input."""

    shard: str
    """File name of the shard."""
    file: str
    """The input file, below the input folder."""
    row_group: int | None
    first_row: int
    """Number of its first row within the file."""


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


def plan(source: Folder, files: dict[str, int]) -> Iterator[Unit]:
    """The units of the input, numbered in its order."""
    number = 0
    for file in files:
        if not _path(source, file).endswith(".parquet"):
            yield Unit(f"shard-{number:06d}.parquet", file, None, 0)
            number += 1
            continue
        first_row = 0
        with _reading(source, file):
            metadata = pq.read_metadata(_path(source, file), filesystem=source.filesystem)
        for group in range(metadata.num_row_groups):
            yield Unit(f"shard-{number:06d}.parquet", file, group, first_row)
            first_row += metadata.row_group(group).num_rows
            number += 1


def read_unit(source: Folder, unit: Unit, column: str, id_column: str | None) -> tuple[pa.StringArray, pa.Array]:
    """Texts and ids of a unit; the ids are row numbers within the file where there is no id column.

    Raises:
        DataError: the file cannot be read, has no such column, or a row has no text or no id.
    """
    where = _name(source, unit.file)
    with _reading(source, unit.file):
        table = _read(source, unit, [column] if id_column is None else [column, id_column])
    for name in (column, id_column):
        if name is not None and name not in table.column_names:
            raise DataError(f"{where}: it has no column {name!r}")
    text = table[column]
    value_type = text.type.value_type if pa.types.is_dictionary(text.type) else text.type
    if not (
        pa.types.is_string(value_type) or pa.types.is_large_string(value_type) or pa.types.is_null(value_type)
    ):
        raise DataError(f"{where}: column {column!r} holds {value_type}, expected strings")
    texts = text.cast(pa.large_string()).combine_chunks()
    blank = np.flatnonzero(texts.fill_null("").to_numpy(zero_copy_only=False) == "")
    if len(blank):
        raise DataError(
            f"{where}: row {unit.first_row + blank[0]} (counted from 0) has no text in column {column!r}"
        )
    if id_column is None:
        return texts, pa.array(np.arange(unit.first_row, unit.first_row + len(texts)), pa.int64())
    ids = table[id_column].combine_chunks()
    missing = _first(ids.is_null())
    if missing is not None:
        raise DataError(
            f"{where}: row {unit.first_row + missing} (counted from 0) has no id in column {id_column!r}"
        )
    return texts, ids


def _first(marked: pa.BooleanArray) -> int | None:
    """Index of the first row that is marked."""
    index = pc.index(marked, value=True).as_py()
    return None if index < 0 else int(index)


def _read(source: Folder, unit: Unit, columns: list[str]) -> pa.Table:
    path = _path(source, unit.file)
    if unit.row_group is not None:
        with pq.ParquetFile(path, filesystem=source.filesystem) as file:
            present = [name for name in columns if name in file.schema_arrow.names]
            return file.read_row_group(unit.row_group, columns=present)
    with source.filesystem.open_input_stream(path) as stream:
        # The text column is read as strings in any case: a file of nothing but dates is text all the same.
        if path.endswith(".csv"):
            return csv.read_csv(
                stream,
                read_options=csv.ReadOptions(block_size=BLOCK),
                parse_options=csv.ParseOptions(newlines_in_values=True),
                convert_options=csv.ConvertOptions(column_types={columns[0]: pa.string()}),
            )
        options = pa_json.ParseOptions(explicit_schema=pa.schema([(columns[0], pa.string())]))
        return pa_json.read_json(stream, pa_json.ReadOptions(block_size=BLOCK), options)


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
