"""A table of texts and their vectors as a teacher: Parquet files with the columns `text` and `vector`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from f2llm_ray.base.errors import DataError, RunError
from f2llm_ray.data.keys import Keys, distinct_keys, find_keys
from f2llm_ray.data.reading.paths import find_files
from f2llm_ray.data.reading.values import is_list
from f2llm_ray.data.schema import KEY, key_numbers, text_key
from f2llm_ray.model.dims import Vectors
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import InputFile

COLUMNS = ["text", "vector"]
KEYS_FILE, ROWS_FILE, VECTORS_FILE = "keys.npy", "rows.npy", "vectors.npy"
SHOWN = 60
"""Characters of a text in an error."""


def table_files(path: str) -> list[InputFile]:
    """The files of a table: one, or those that a glob matches.

    Raises:
        DataError: there are none.
    """
    return list(find_files(path, (".parquet",), f"distill.teacher: {path}").values())


def write_vector_table(path: str, out: Folder) -> int:
    """Writes the vectors of a table by the keys of their texts, unless they are there; returns their dims.

    A text that stands there twice has the vector of its last row. Memory: one row group, and 24 bytes a row.

    Raises:
        DataError: a file without the two columns, or with a vector that is missing, not finite or of another
            length than the first.
    """
    if out.exists(KEYS_FILE):
        return int(out.read_array(VECTORS_FILE).shape[1])
    files = [file.uri for file in table_files(path)]
    rows, dims, found, keys = sum(map(_rows_of, files)), 0, None, []
    with out.writing() as folder:
        at = 0
        for uri in files:
            for table in _groups(uri):
                group = _vectors(table, uri, dims)
                if found is None:
                    dims = group.shape[1]
                    target = folder / VECTORS_FILE
                    found = np.lib.format.open_memmap(target, "w+", np.float32, (rows, dims))
                found[at : at + len(group)] = group
                keys.append(key_numbers(pa.array([text_key(text) for text in table["text"].to_pylist()], KEY)))
                at += len(group)
        if found is None:
            raise DataError(f"distill.teacher: {path}: found no row, expected texts and vectors")
        found.flush()
        distinct, place = distinct_keys(np.concatenate(keys))
        row_of = np.empty(len(distinct), np.int64)
        row_of[place] = np.arange(rows)  # of places that repeat, NumPy keeps the last
        np.save(folder / ROWS_FILE, row_of)
        np.save(folder / KEYS_FILE, np.ascontiguousarray(distinct.T))
    return dims


def _rows_of(uri: str) -> int:
    with _opened(uri) as file:
        missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
        if missing:
            raise DataError(
                f"{uri}: found the columns {file.schema_arrow.names}, expected {' and '.join(COLUMNS)}"
            )
        return int(file.metadata.num_rows)


def _groups(uri: str) -> Iterator[pa.Table]:
    with _opened(uri) as file:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number, columns=COLUMNS)


def _opened(uri: str) -> pq.ParquetFile:
    folder = Folder.at(uri)
    try:
        return pq.ParquetFile(folder.path, filesystem=folder.filesystem)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{uri}: not a Parquet file: {error}") from None


def _vectors(table: pa.Table, uri: str, dims: int) -> Vectors:
    """The vectors [n, d] of a row group."""
    column = table["vector"].combine_chunks()
    if not is_list(column.type):
        raise DataError(f"{uri}: vector is {column.type}, expected a list of numbers")
    if column.null_count or table["text"].null_count:
        raise DataError(f"{uri}: found a row without a text or a vector, expected both in every row")
    lengths = set(pc.list_value_length(column).to_pylist()) if len(column) else {dims}
    if len(lengths | ({dims} if dims else set())) > 1:
        raise DataError(f"{uri}: found vectors of {sorted(lengths)} numbers, expected {dims or 'one length'}")
    values = pc.list_flatten(column).to_numpy(zero_copy_only=False).astype(np.float32)
    vectors_nd = values.reshape(len(column), -1)
    if not np.isfinite(vectors_nd).all():
        raise DataError(f"{uri}: found a vector that is not finite")
    return vectors_nd


class VectorTable:
    """The vectors of a table, found by text.

    Args:
        folder: what `write_vector_table` wrote.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.keys: Keys = folder.read_array(KEYS_FILE)
        self.rows, self.vectors = folder.read_array(ROWS_FILE), folder.read_array(VECTORS_FILE)

    def embed_counted(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """The vectors [n, d] of texts as the table has them; it reads no token.

        Raises:
            RunError: a text that is not in the table.
        """
        keys = key_numbers(pa.array([text_key(text) for text in texts], KEY))
        places = find_keys(self.keys, keys)
        missing = np.flatnonzero(places < 0)
        if len(missing):
            first = texts[int(missing[0])]
            shown = first if len(first) <= SHOWN else f"{first[:SHOWN]}…"
            raise RunError(
                f"distill.teacher: the table has no vector of {len(missing):,} of {len(texts):,} texts, such as "
                f"{shown!r}; expected one for every query, passage and negative of the stage"
            )
        return np.asarray(self.vectors[self.rows[places]], dtype=np.float32), 0
