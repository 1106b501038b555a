"""The table of ids: distinct rows of each source, in key order, with groups, negatives and split."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.base.errors import DataError
from f2llm_ray.data.account import Account, count_by
from f2llm_ray.data.dedup import dedup
from f2llm_ray.data.flow import Part, Tables, map_groups, map_parts, part_file
from f2llm_ray.data.keys import KEYS, prompted, shard_of
from f2llm_ray.data.near.groups import Groups
from f2llm_ray.data.negatives import class_negatives, label_negatives
from f2llm_ray.data.pairs import drop_positives
from f2llm_ray.data.ragged import lengths_of, list_array
from f2llm_ray.data.reading.base import SourceBase
from f2llm_ray.data.schema import KEY, SCORES, TextPrompts, key_numbers, with_column
from f2llm_ray.data.settings import Data
from f2llm_ray.run.folder import Folder

READ_COLUMNS = ["source", "language", "passage_language", "label", *KEYS.names]
GROUPS = pa.schema([("query_group", KEY), ("passage_group", KEY)])
PLACE_COLUMNS = ["piece", "position"]
ID_COLUMNS = [*READ_COLUMNS, *GROUPS.names, *PLACE_COLUMNS]
REMOVED_COLUMNS = ["language", "drop", *PLACE_COLUMNS, "kept_piece", "kept_position"]


def write_table(
    sources: Mapping[str, SourceBase],
    settings: Data,
    seed: int,
    *,
    parts: list[Part],
    prompts: TextPrompts,
    prepared: Folder,
    account: Account,
    shards: int,
) -> None:
    """Dedups ids by query group, then writes `table/<source>.parquet`, and `removed/` for the rest.

    Args:
        sources: the sources by name, in order.
        settings: of near-duplicates and of the split.
        seed: of the negatives that are drawn from labels.
        parts: the parts of the sources.
        prompts: what all queries and passages start with; the table has the ids of texts with their prompts.
        prepared: folder with `rows/`, and `near/` where near-duplicates were looked for.
        account: gets the rows and negatives that were taken out.
        shards: key ranges.

    Raises:
        DataError: a classification or clustering source without any negative.
    """
    near = prepared / "near" / "groups" if settings.near_dedup is not None else None
    labels = frozenset(name for name, source in sources.items() if source.task == "classification")
    scored = frozenset(name for name, source in sources.items() if source.scored)
    rows = prepared / "rows"
    ids = map_parts(parts, partial(_read_ids, labels=labels, scored=scored, rows=rows, near=near, shards=shards))
    unique = map_groups(ids, "shard", partial(_settle, near=near, shards=shards))
    written = map_groups(
        unique,
        "source",
        partial(
            _write_source,
            sources=dict(sources),
            validation=settings.validation,
            seed=seed,
            prompts=prompts,
            prepared=prepared,
        ),
    )
    for row in written.iter_rows():
        task = sources[row["source"]].task
        if task != "retrieval" and row["kept"] and not row["with_negatives"]:
            raise DataError(
                f"source {row['source']!r}: none of its {row['kept']:,} rows has a negative, and {task} learns "
                "from negatives alone; give it negatives, or labels"
            )
        for language, drop, n in json.loads(row["lost"]):
            account.drop(row["source"], language, drop, n)
        account.add_negatives(row["source"], **{"the query or a positive of it": row["dropped_negatives"]})


@contextmanager
def _opened(near: Folder | None, shards: int) -> Iterator[Groups]:
    """The groups that near dedup found; every text is its own where it did not run."""
    if near is None:
        yield Groups(None, shards)
    else:
        with near.as_local() as folder:
            yield Groups(folder, shards)


def _read_ids(
    part: Part, *, labels: frozenset[str], scored: frozenset[str], rows: Folder, near: Folder | None, shards: int
) -> Tables:
    own = [field.name for field in SCORES] if part.source in scored else []
    ids = rows.read_table(part.file, [*READ_COLUMNS, *own, "drop"])
    for field in () if own else SCORES:  # the rows of all sources go through one shuffle
        ids = ids.append_column(field, pa.nulls(len(ids), field.type))
    for name, value in {"piece": part.number, "source_rank": part.source_rank}.items():
        ids = ids.append_column(name, pa.array(np.full(len(ids), value), pa.int64()))
    ids = ids.append_column("position", pa.array(np.arange(len(ids)), pa.int64()))
    ids = ids.filter(pc.is_null(ids["drop"])).drop_columns(["drop"])
    with _opened(near, shards) as groups:
        # Two labels that read alike are still two.
        passage = ids["passage_key"] if part.source in labels else groups.of_array(ids["passage_key"])
        ids = ids.append_column("query_group", groups.of_array(ids["query_key"]))
        ids = ids.append_column("passage_group", passage)
    yield ids.append_column("shard", pa.array(shard_of(key_numbers(ids["query_group"]), shards)))


def _settle(ids: pa.Table, *, near: Folder | None, shards: int) -> pa.Table:
    """Dedup and negatives of a shard, which has all rows of its query groups."""
    with _opened(near, shards) as groups:
        return drop_positives(dedup(ids), groups)


def _write_source(
    ids: pa.Table,
    *,
    sources: Mapping[str, SourceBase],
    validation: float,
    seed: int,
    prompts: TextPrompts,
    prepared: Folder,
) -> pa.Table:
    name = ids["source"][0].as_py()
    source = sources[name]
    ids = ids.sort_by([(column, "ascending") for column in ("row_key", *PLACE_COLUMNS)])
    left = pc.is_null(ids["drop"])
    if source.cap is not None:  # keys are hashes: the first rows are a random draw
        over = pc.and_(left, pc.greater(pc.cumulative_sum(pc.cast(left, pa.int64())), source.cap))
        ids = with_column(ids, "drop", pc.if_else(over, "cap: over the source's cap", ids["drop"]))
        left = pc.is_null(ids["drop"])
    removed = ids.filter(pc.invert(left)).select(REMOVED_COLUMNS)
    (prepared / "removed").write_table(f"{name}.parquet", [removed], removed.schema)
    kept = ids.filter(left)
    dropped = int(pc.sum(kept["dropped_negatives"]).as_py() or 0)
    kept = kept.select([*ID_COLUMNS, *(field.name for field in SCORES if source.scored)])
    if source.task == "classification":
        kept = label_negatives(kept, source=name, seed=seed)
    elif source.task == "clustering":
        kept = class_negatives(kept, source=name, seed=seed)
    kept = with_prompts(kept, prompts)
    kept = kept.append_column("validation", is_validation(kept["row_key"].combine_chunks(), validation))
    (prepared / "table").write_table(f"{name}.parquet", [kept], kept.schema)
    facts = {
        "source": name,
        "lost": json.dumps(count_by(removed, "language", "drop")),
        "dropped_negatives": dropped,
        "kept": len(kept),
        "with_negatives": int(np.count_nonzero(lengths_of(kept["negative_keys"].combine_chunks()))),
    }
    return pa.Table.from_pylist([facts])


def with_prompts(ids: pa.Table, prompts: TextPrompts) -> pa.Table:
    """The ids of texts with their prompts before them, in place of those of the texts.

    Those of queries with an instruction stay: it is said instead of the prompt.
    """
    ids = ids.combine_chunks()
    for name, prompt in {"query_key": prompts.query, "passage_key": prompts.document}.items():
        ids = with_column(ids, name, prompted(ids[name].combine_chunks(), prompt))
    lists = ids["negative_keys"].combine_chunks()
    flat = prompted(lists.flatten().cast(KEY), prompts.document)
    return with_column(ids, "negative_keys", list_array(flat, lengths_of(lists)))


def is_validation(row_keys: pa.Array, share: float) -> pa.Array:
    """Whether each row belongs to the validation split: decided by its key alone, so it never changes sides."""
    low = key_numbers(row_keys)[:, 1] >> np.uint64(11)
    return pa.array(low.astype(np.float64) / 2.0**53 < share)


def samples(prepared: Folder, source: str, tag: str, most: int) -> list[dict[str, Any]]:
    """Rows of a source that a tag took out, each with the row that stayed for it, for a person to look at."""
    if not (prepared / "removed").exists(f"{source}.parquet"):
        return []
    removed = (prepared / "removed").read_table(f"{source}.parquet")
    removed = removed.filter(pc.equal(removed["drop"], tag)).slice(0, most)
    texts = partial(_texts_at, prepared / "rows")
    return [
        {
            "source": source,
            "language": row["language"],
            "kept": texts(row["kept_piece"], row["kept_position"]),
            "dropped": texts(row["piece"], row["position"]),
        }
        for row in removed.to_pylist()
    ]


def _texts_at(rows: Folder, piece: int, position: int) -> dict[str, str]:
    for table in rows.read_batches(part_file(piece), ["query", "passage"]):
        if position < len(table):
            return dict(table.slice(position, 1).to_pylist()[0])
        position -= len(table)
    raise AssertionError("a place in the table is a row of its file")
