"""Reading: the one pass over the text. Each part is read, cleaned, understood, screened, keyed and written."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.base.progress import Progress
from f2llm_ray.data.account import Account, part_account
from f2llm_ray.data.clean import clean
from f2llm_ray.data.decontaminate import Screen, decontaminate
from f2llm_ray.data.flow import Part, Tables, checked, map_parts, parts_of
from f2llm_ray.data.identify import FOUND, Identifier
from f2llm_ray.data.keys import KEYS, add_keys
from f2llm_ray.data.pairs import drop_near_positives
from f2llm_ray.data.ragged import lengths_of
from f2llm_ray.data.reading.base import SourceBase
from f2llm_ray.data.schema import ROW
from f2llm_ray.data.settings import Data
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    from ray import ObjectRef

NEGATIVES = pa.schema(
    [
        ("given_negatives", pa.int32()),
        ("dropped_negatives", pa.int32()),  # those that were near-equal to the passage
    ]
)
WRITTEN = pa.schema([*ROW, *FOUND, *NEGATIVES, *KEYS])
# Two texts with this Jaccard say the same where near dedup accepts every candidate.
NEAR_EQUAL = 0.7
PAIR = ["query", "passage", "language"]


def write_rows(recipe: Recipe, parts: list[Part], screen: Screen | None, rows: Folder) -> Account:
    """Writes the rows of every part with all their tags, and counts them.

    A part that an earlier try has written is not read again.

    Args:
        recipe: the run's recipe.
        parts: the parts of its sources.
        screen: the texts of the evaluation sets.
        rows: folder that gets one file per part.
    """
    import ray

    language_id = recipe.data.language_id
    identifier = None if language_id is None else Identifier(language_id)
    write = partial(_write_part, recipe=recipe, screen=ray.put(screen), identifier=identifier, rows=rows)
    account = Account()
    progress = Progress("prepare: read", len(parts), "parts")
    done = 0
    for batch in checked(map_parts(parts, write).iter_batches(batch_size=None, batch_format="pyarrow")):
        for row in batch.to_pylist():
            for found in json.loads(row["account"]):
                account.add_part(row["source"], found)
            done += 1
        progress.update(done, f"{account.rows:,} rows")
    return account


def _write_part(
    part: Part,
    *,
    recipe: Recipe,
    screen: ObjectRef[Screen | None],
    identifier: Identifier | None,
    rows: Folder,
) -> Tables:
    import ray

    source = recipe.sources[part.source]
    if not rows.exists(part.file):
        index = ray.get(screen)
        tables = (
            add_keys(decontaminate(_found(table, recipe.data, identifier), index), source.query_instruction)
            .select(WRITTEN.names)
            .cast(WRITTEN)
            for table in _cleaned(part, source, recipe.data)
        )
        rows.write_table(part.file, tables, WRITTEN)
    columns = ["language", "query", "passage", "drop", *FOUND.names, *NEGATIVES.names]
    account = [part_account(table) for table in rows.read_batches(part.file, columns)]
    yield pa.table({"source": [part.source], "account": [json.dumps(account)]})


def _found(rows: pa.Table, settings: Data, identifier: Identifier | None) -> pa.Table:
    """Adds the columns of `FOUND` and `NEGATIVES`."""
    given = lengths_of(rows["negatives"].combine_chunks())
    rows = rows.append_column("given_negatives", pa.array(given, pa.int32()))
    if settings.near_dedup is not None:
        threshold = settings.near_dedup.min_jaccard or NEAR_EQUAL
        rows = drop_near_positives(rows, size=settings.near_dedup.shingle, min_jaccard=threshold)
    else:
        rows = rows.append_column("dropped_negatives", pa.array(np.zeros(len(rows)), pa.int32()))
    if identifier is not None:
        return identifier.tag(rows)
    for field in FOUND:
        rows = rows.append_column(field, pa.nulls(len(rows), field.type))
    return rows


def read_pairs(name: str, source: SourceBase, settings: Data) -> pa.Table:
    """All clean pairs of a held-out source; such a set is small enough for one process."""
    import ray

    read = map_parts(parts_of({name: source}), partial(_pairs, source=source, settings=settings))
    tables = list(checked(ray.get(read.to_arrow_refs())))
    return pa.concat_tables(tables) if tables else pa.schema([ROW.field(field) for field in PAIR]).empty_table()


def _pairs(part: Part, *, source: SourceBase, settings: Data) -> Tables:
    for table in _cleaned(part, source, settings):
        yield table.filter(pc.is_null(table["drop"])).select(PAIR)


def _cleaned(part: Part, source: SourceBase, settings: Data) -> Tables:
    for piece in part.pieces:
        for table in source.read(part.source, piece, settings.on_bad_row):
            yield clean(table, settings)
