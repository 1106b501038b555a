"""What mining found, joined with the negatives that the sources brought: one file per source."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet as pq

from f2llm_ray.data.keys import Keys, distinct_keys, find_keys
from f2llm_ray.data.ragged import Ints, lengths_of, list_array, numbered
from f2llm_ray.data.schema import KEY, key_array, key_numbers
from f2llm_ray.mine.candidates import Candidates
from f2llm_ray.run.folder import Folder

MINED = pa.schema([("row_key", KEY), ("negative_keys", pa.list_(KEY))])
JOIN_ROWS = 65_536
"""Rows joined at once."""


def join_source(name: str, prepared: Folder, out: Folder, count: int) -> dict[str, Any]:
    """Writes `<source>.parquet`: row_key and up to `count` negative_keys, in the table's row order.

    `out` is the mining stage's folder, with every shard of the source in `found/`.

    Returns:
        `short_rows`, `mean_negatives` and `dropped`.
    """
    shards, found = out / "found" / name, Candidates.load(out / "plan" / name)
    table = (prepared / "table").read_table(f"{name}.parquet", ["row_key", "negative_keys"]).combine_chunks()
    mined = pa.concat_tables(shards.read_table(file) for file in shards.files(".parquet"))
    mined = mined.combine_chunks().sort_by("row")["candidates"].combine_chunks()
    totals: Counter[str] = Counter()

    def parts() -> Iterator[pa.Table]:
        for at in range(0, len(table), JOIN_ROWS):
            rows = table.slice(at, JOIN_ROWS)
            given = rows["negative_keys"].combine_chunks()
            lists = join_negatives(given, mined.slice(at, JOIN_ROWS), found, count)
            lengths = lengths_of(lists)
            totals.update(short_rows=int((lengths < count).sum()), negatives=int(lengths.sum()))
            yield pa.table([rows["row_key"], lists], schema=MINED)

    out.write_table(f"{name}.parquet", parts(), MINED)
    mean = round(totals["negatives"] / len(table), 3)
    return {"short_rows": totals["short_rows"], "mean_negatives": mean, "dropped": _dropped(shards)}


def _dropped(shards: Folder) -> dict[str, int]:
    total: Counter[str] = Counter()
    for file in shards.files(".parquet"):
        schema = pq.read_schema(f"{shards.path}/{file}", filesystem=shards.filesystem)
        total.update(json.loads(schema.metadata[b"dropped"]))
    return dict(total)


def join_negatives(given: pa.ListArray, mined: pa.ListArray, found: Candidates, count: int) -> pa.ListArray:
    """The keys of each row's negatives: those that a source brought, then mined ones, `count` at most.

    A given text that comes twice stands once. A candidate is left out where its group has a given one already, as
    far as that is a passage of the source. That no given one is a positive is the table's doing.

    `mined` are the candidates of each row, nearest first.
    """
    of_given = np.repeat(np.arange(len(given)), lengths_of(given))
    of_mined = np.repeat(np.arange(len(mined)), lengths_of(mined))
    given_keys = key_numbers(pc.list_flatten(given).cast(KEY))
    candidates = mined.flatten().to_numpy().astype(np.int64)
    text = find_keys(found.texts, given_keys)
    stands = np.where(text < 0, -1, found.number[text])
    taken = of_given * len(found.candidates) + stands
    free = ~np.isin(of_mined * len(found.candidates) + candidates, taken[stands >= 0])
    once = _first_of_each(of_given, given_keys)
    row = np.concatenate([of_given[once], of_mined[free]])
    keys = np.concatenate([given_keys[once], found.texts[:, found.candidates[candidates[free]]].T])
    order = np.argsort(row, kind="stable")  # given ones lie before mined ones, both in their own order
    row, keys = row[order], keys[order]
    kept = numbered(np.bincount(row, minlength=len(given))) < count
    return list_array(key_array(keys[kept]), np.bincount(row[kept], minlength=len(given)))


def _first_of_each(row: Ints, keys: Keys) -> Ints:
    """Places, rising, of the first time that each key stands in each row."""
    _, key = distinct_keys(keys)
    _, first = np.unique(row * (len(keys) + 1) + key, return_index=True)
    return np.sort(first)
