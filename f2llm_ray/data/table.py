"""The table of ids: distinct rows of each source, in key order, with negatives and split."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.data.account import count_tags
from f2llm_ray.data.dedup import dedup
from f2llm_ray.data.flow import Part, Tables, map_groups, map_parts
from f2llm_ray.data.keys import KEYS, shard_of
from f2llm_ray.data.negatives import label_negatives
from f2llm_ray.data.schema import key_numbers
from f2llm_ray.data.split import is_validation
from f2llm_ray.recipe import Recipe
from f2llm_ray.run import Folder

PLACE_COLUMNS = ["piece", "position"]
ID_COLUMNS = ["source", "language", "passage_language", *KEYS.names, *PLACE_COLUMNS]


def write_table(recipe: Recipe, parts: list[Part], rows: Folder, table: Folder) -> list[dict[str, Any]]:
    """Dedups ids by key range, then writes `<source>.parquet` for every source.

    Args:
        recipe: the run's recipe.
        parts: the parts of its sources.
        rows: folder with the rows of each part.
        table: folder that gets one file per source.

    Returns:
        Counts of the rows that were taken out, by source, language and drop.
    """
    ids = map_parts(parts, partial(_read_ids, rows=rows, shards=recipe.data.shards))
    unique = map_groups(ids, "shard", dedup)
    lost = map_groups(unique, "source", partial(_write_source, recipe=recipe, table=table))
    return list(lost.take_all())


def _read_ids(part: Part, *, rows: Folder, shards: int) -> Tables:
    ids = rows.read_table(part.file, [*ID_COLUMNS[: -len(PLACE_COLUMNS)], "drop"])
    constants = {"piece": part.number, "source_rank": part.source_rank}
    for name, value in constants.items():
        ids = ids.append_column(name, pa.array(np.full(len(ids), value), pa.int64()))
    ids = ids.append_column("position", pa.array(np.arange(len(ids)), pa.int64()))
    ids = ids.filter(pc.is_null(ids["drop"]))
    yield ids.append_column("shard", pa.array(shard_of(key_numbers(ids["row_key"]), shards)))


def _write_source(ids: pa.Table, *, recipe: Recipe, table: Folder) -> pa.Table:
    name = ids["source"][0].as_py()
    source = recipe.sources[name]
    kept = ids.filter(pc.is_null(ids["drop"])).select(ID_COLUMNS).sort_by("row_key")
    lost = ids.filter(pc.is_valid(ids["drop"])).select(["source", "language", "drop"])
    if source.cap is not None:  # keys are hashes: the first rows are a random draw
        over = kept.slice(source.cap).select(["source", "language"])
        tag = pa.array(["cap: over the source's cap"] * len(over), pa.string())
        lost = pa.concat_tables([lost, over.append_column("drop", tag)])
        kept = kept.slice(0, source.cap)
    if source.task == "classification":
        kept = label_negatives(kept, source=name, seed=recipe.seed)
    split = is_validation(kept["row_key"].combine_chunks(), recipe.data.validation)
    kept = kept.append_column("validation", split)
    table.write_table(f"{name}.parquet", [kept], kept.schema)
    return count_tags(lost)
