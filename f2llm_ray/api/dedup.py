"""Near-duplicates of any table of texts, by the search that prepares training data (`data/near`).

Of rows that are equal, or near-equal in every column that is named, the first one stays.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from f2llm_ray.api.plainly import plainly
from f2llm_ray.base.errors import ArgumentError, DataError
from f2llm_ray.data.flow import Part, part_file
from f2llm_ray.data.keys import distinct_keys
from f2llm_ray.data.near.find import find_groups
from f2llm_ray.data.near.groups import Groups
from f2llm_ray.data.ragged import Ints
from f2llm_ray.data.schema import KEY, key_numbers, text_key
from f2llm_ray.data.settings import NearDedup, Preset
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    import pandas as pd
    import ray.data

    DataT = TypeVar("DataT", pa.Table, pd.DataFrame, ray.data.Dataset)
else:
    DataT = TypeVar("DataT")

BLOCK_ROWS = 50_000
"""Rows of a table that one task works on."""
SHARD_ROWS = 250_000
"""Rows for each key range of the shuffles."""
SOURCE = "texts"
CLUSTERS = pa.schema([("row", pa.int64()), ("kept", pa.int64())])


@dataclass(frozen=True)
class Deduplicated(Generic[DataT]):
    """What `dedup` returns."""

    kept: DataT
    """The rows that stay, in their order; of the kind that was given."""
    clusters: pa.Table
    """Every row that has a near-duplicate (`row`, its number from 0), with the one that stays for it (`kept`)."""
    rows: int
    """Rows that were given."""

    @property
    def dropped(self) -> int:
        """Rows that do not stay."""
        return int(np.sum(self.clusters["row"].to_numpy() != self.clusters["kept"].to_numpy()))


def dedup(
    data: DataT,
    columns: str | Sequence[str] = "text",
    *,
    preset: Preset = "standard",
    shingle: int = 5,
    min_jaccard: float | None = 0.7,
    scratch: str | None = None,
) -> Deduplicated[DataT]:
    """Finds near-duplicates by MinHash-LSH and an exact check of Jaccard similarity, on Ray.

    Nothing depends on how the rows are spread over blocks or workers. This process holds 16 bytes for each row and
    column; texts stay in their blocks.

    Args:
        data: a pyarrow Table, a pandas DataFrame or a Ray Dataset.
        columns: the column of text, or several: rows are near-duplicates if they are in each of them.
        preset: how eagerly candidates are found: loose, standard or strict.
        shingle: tokens of a shingle.
        min_jaccard: candidates whose shingles have a smaller Jaccard are none; None accepts every candidate.
        scratch: a folder or URI for its files, which every node of the cluster must reach; a temporary folder on
            this machine when unset.

    Raises:
        ArgumentError: no column is named, or one twice.
        DataError: no such column, or a row without text in one.
    """
    import ray

    from f2llm_ray.base.session import connect

    names = [columns] if isinstance(columns, str) else list(columns)
    if not names or len(set(names)) < len(names):
        raise ArgumentError(f"columns: found {names}, expected one or more different names")
    settings = NearDedup(preset=preset, shingle=shingle, min_jaccard=min_jaccard)
    connect()
    with ExitStack() as stack, plainly():
        place = scratch or stack.enter_context(tempfile.TemporaryDirectory(prefix="f2llm-dedup-"))
        folder = Folder.at(place)
        blocks = _blocks(data, names)
        write = ray.remote(_write_part)
        done = ray.get([write.remote(block, number, names, folder) for number, block in enumerate(blocks)])
        kept = _kept_rows([keys for keys in done if len(keys)], settings, folder)
    lengths = [len(keys) for keys in done]
    everyone = np.arange(len(kept))
    counts = np.bincount(kept, minlength=len(kept))
    members = np.flatnonzero(counts[kept] > 1)
    clusters = pa.table({"row": members, "kept": kept[members]}, CLUSTERS)
    clusters = clusters.sort_by([("kept", "ascending"), ("row", "ascending")])
    return Deduplicated(_rows_of(data, blocks, lengths, kept == everyone), clusters, len(kept))


def _blocks(data: Any, names: Sequence[str]) -> list[Any]:
    """The data as Arrow tables in Ray's object store, in the order of the rows."""
    import ray
    import ray.data

    if isinstance(data, ray.data.Dataset):
        return list(data.to_arrow_refs())
    found = data.column_names if isinstance(data, pa.Table) else getattr(data, "columns", None)
    if found is None:
        kinds = "a pyarrow Table, a pandas DataFrame or a Ray Dataset"
        raise ArgumentError(f"data: found {type(data).__name__}, expected {kinds}")
    _check_columns(list(found), names)
    table = (
        data.select(names)
        if isinstance(data, pa.Table)
        else pa.Table.from_pandas(data[names], preserve_index=False)
    )
    return [ray.put(table.slice(start, BLOCK_ROWS)) for start in range(0, len(table), BLOCK_ROWS)]


def _check_columns(found: Sequence[str], names: Sequence[str]) -> None:
    for name in names:
        if name not in found:
            raise DataError(f"column {name!r}: not there; the columns are {list(found)}")


def _write_part(block: pa.Table, number: int, names: Sequence[str], folder: Folder) -> pa.Table:
    """Writes the texts of a block where `find_groups` reads them, and returns the key of each text by column."""
    if not len(block):
        return pa.table({name: pa.array([], KEY) for name in names})
    _check_columns(block.column_names, names)
    keys, texts = {}, []
    for name in names:
        values = block[name].to_pylist()
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise DataError(f"row {row} of block {number}, column {name!r}: found {value!r}, expected text")
        keys[name] = pa.array([text_key(value) for value in values], KEY)
        texts += values
    all_keys = pa.concat_arrays(list(keys.values()))
    rows = pa.table({"query": texts, "query_key": all_keys, "drop": pa.nulls(len(texts), pa.string())})
    (folder / "rows").write_table(part_file(number), [rows], rows.schema)
    return pa.table(keys)


def _kept_rows(done: Sequence[pa.Table], settings: NearDedup, folder: Folder) -> Ints:
    """The row [n] that stays for each row: the first one of its group."""
    if not done:
        return np.zeros(0, np.int64)
    keys = pa.concat_tables(done)
    numbers = [int(name.partition(".")[0]) for name in (folder / "rows").files()]
    parts = [Part(number, SOURCE, 0, ()) for number in numbers]
    shards = 1 + len(keys) // SHARD_ROWS
    # As a source of classification: of those the queries alone are compared.
    find_groups(settings, {SOURCE: "classification"}, parts, folder, shards)
    with (folder / "near" / "groups").as_local() as local:
        groups = Groups(local, shards)
        columns = [distinct_keys(groups.of(key_numbers(keys[name])))[1] for name in keys.column_names]
    _, group_n = np.unique(np.column_stack(columns), axis=0, return_inverse=True)
    first = np.full(len(keys), len(keys), np.int64)
    np.minimum.at(first, group_n.ravel(), np.arange(len(keys)))
    return first[group_n.ravel()]


def _rows_of(data: Any, blocks: Sequence[Any], lengths: Sequence[int], keep: np.ndarray[Any, Any]) -> Any:
    """The rows to keep, as the kind of data that was given."""
    import ray
    import ray.data

    if isinstance(data, pa.Table):
        return data.filter(pa.array(keep))
    if not isinstance(data, ray.data.Dataset):
        return data[keep]
    ends = np.cumsum(lengths)
    pick = ray.remote(_filter)
    found = zip(blocks, lengths, ends, strict=True)
    return ray.data.from_arrow_refs([pick.remote(block, keep[end - size : end]) for block, size, end in found])


def _filter(block: pa.Table, keep: np.ndarray[Any, Any]) -> pa.Table:
    return block.filter(pa.array(keep))
