"""Reading: the one pass over the text, from the files of the sources to one file of rows per part.

A row is read, cleaned, given its language, compared with the evaluation sets, and given the keys of its texts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.base.progress import Progress
from f2llm_ray.data.account import Account, part_account
from f2llm_ray.data.clean import clean
from f2llm_ray.data.decontaminate import SETS, Screen, decontaminate
from f2llm_ray.data.flow import Part, Tables, checked, map_parts, parts_of
from f2llm_ray.data.identify import FOUND, Identifier
from f2llm_ray.data.keys import KEYS, add_keys
from f2llm_ray.data.pairs import drop_near_positives
from f2llm_ray.data.ragged import lengths_of
from f2llm_ray.data.reading.base import SourceBase
from f2llm_ray.data.schema import ROW, SCORES, seeded_key
from f2llm_ray.data.settings import Data
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    from ray import ObjectRef

# Given by the source; dropped since they were near-equal to the passage; the sets whose texts dropped ones held.
NEGATIVES = pa.schema(
    [("given_negatives", pa.int32()), ("dropped_negatives", pa.int32()), ("screened_negatives", SETS)]
)
SCORED = pa.schema([*ROW, *FOUND, *NEGATIVES, *KEYS])
"""What is written of rows that bring scores."""
WRITTEN = pa.schema([field for field in SCORED if field not in SCORES])
"""What is written of others."""
# Two texts with this Jaccard say the same where near dedup accepts every candidate.
NEAR_EQUAL = 0.7
PAIR = ["query", "passage", "language"]
BAD = "read: "
"""What the tag of a malformed row begins with."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What every reading task depends on."""

    sources: Mapping[str, SourceBase]
    settings: Data
    screen: ObjectRef[Screen | None]
    """The texts of the evaluation sets."""
    identifier: Identifier | None
    rows: Folder
    """Gets one file per part."""
    known: Folder
    """Where the root remembers which file holds a part, by the part's key."""


def write_rows(
    sources: Mapping[str, SourceBase],
    settings: Data,
    *,
    parts: list[Part],
    screen: Screen | None,
    rows: Folder,
    known: Folder,
) -> Account:
    """Writes the rows of every part with all their tags, and counts them; arguments as in `Reading`.

    A part that this or another run in the root has written under the same key is not read again.

    Raises:
        DataError: a malformed file, or a malformed row where `on_bad_row` is "error".
    """
    import ray

    task = Reading(
        sources=dict(sources),
        settings=settings,
        screen=ray.put(screen),
        identifier=None if settings.language_id is None else Identifier(settings.language_id),
        rows=rows,
        known=known,
    )
    account = Account()
    progress = Progress("prepare: read", len(parts), "parts")
    done = kept = 0
    read = map_parts(parts, partial(_write_part, task=task))
    for batch in checked(read.iter_batches(batch_size=None, batch_format="pyarrow")):
        for row in batch.to_pylist():
            for found in json.loads(row["account"]):
                account.add_part(row["source"], found)
            done, kept = done + 1, kept + row["kept"]
        progress.update(done, f"{account.rows:,} rows", *([f"{kept:,} parts read before"] if kept else []))
    return account


def _write_part(part: Part, *, task: Reading) -> Tables:
    import ray

    source = task.sources[part.source]
    kept = task.rows.exists(part.file) or _bring(part, task)
    if not kept:
        index, schema = ray.get(task.screen), SCORED if source.scored else WRITTEN
        tables = (
            add_keys(decontaminate(_found(table, task), index), source.query_instruction)
            .select(schema.names)
            .cast(schema)
            for table in _cleaned(part, source, task.settings)
        )
        task.rows.write_table(part.file, tables, schema)
        task.known.write_json(f"{part.key}.json", {"file": f"{task.rows.uri}/{part.file}"})
    columns = ["language", "query", "passage", "drop", *FOUND.names, *NEGATIVES.names]
    account = [part_account(table) for table in task.rows.read_batches(part.file, columns)]
    tags = [row for found in account for row in found["rows"]]
    if task.settings.on_bad_row == "error" and any((drop or "").startswith(BAD) for _, drop, _ in tags):
        for _ in _cleaned(part, source, task.settings):  # read while bad rows were skipped: now name the first
            pass
    yield pa.table({"source": [part.source], "account": [json.dumps(account)], "kept": [int(kept)]})


def _bring(part: Part, task: Reading) -> bool:
    """Takes the rows of a part over from where the root remembers them; False where it does not."""
    if not task.known.exists(f"{part.key}.json"):
        return False
    folder, _, name = task.known.read_json(f"{part.key}.json")["file"].rpartition("/")
    found = Folder.at(folder)
    if not found.exists(name):
        return False
    with task.rows.replacing(part.file) as temporary:
        if found.local is not None:
            os.link(found.local / name, temporary)  # files of rows are never changed, only replaced
        else:
            found.filesystem.copy_file(f"{found.path}/{name}", temporary)
    return True


def _found(rows: pa.Table, task: Reading) -> pa.Table:
    """Adds the columns of `FOUND`, and of `NEGATIVES` the counts."""
    given = lengths_of(rows["negatives"].combine_chunks())
    rows = rows.append_column("given_negatives", pa.array(given, pa.int32()))
    near = task.settings.near_dedup
    if near is not None:
        rows = drop_near_positives(rows, size=near.shingle, min_jaccard=near.min_jaccard or NEAR_EQUAL)
    else:
        rows = rows.append_column("dropped_negatives", pa.array(np.zeros(len(rows)), pa.int32()))
    if task.identifier is not None:
        return task.identifier.tag(rows)
    for field in FOUND:
        rows = rows.append_column(field, pa.nulls(len(rows), field.type))
    return rows


def read_pairs(name: str, source: SourceBase, settings: Data, passages: int | None = None) -> pa.Table:
    """The clean pairs of a held-out source: all, or those of so many passages, which are drawn by content hash.

    What is returned is small enough for one process; the source need not be where a number of passages is given.
    """
    import ray

    work = partial(_pairs, source=source, settings=settings, passages=passages)
    tables = list(checked(ray.get(map_parts(parts_of({name: source}), work).to_arrow_refs())))
    if not tables:
        return pa.schema([ROW.field(field) for field in PAIR]).empty_table()
    return _drawn(pa.concat_tables(tables), passages)


def _pairs(part: Part, *, source: SourceBase, settings: Data, passages: int | None) -> Tables:
    for table in _cleaned(part, source, settings):
        yield _drawn(table.filter(pc.is_null(table["drop"])).select(PAIR), passages)


def _drawn(pairs: pa.Table, passages: int | None) -> pa.Table:
    """The pairs of the passages whose hashes are the least: those of a whole are among those of its parts."""
    if passages is None:
        return pairs
    kept = sorted(pairs["passage"].unique().to_pylist(), key=lambda text: seeded_key("held out", text))[:passages]
    return pairs.filter(pc.is_in(pairs["passage"], pa.array(kept, pairs["passage"].type)))


def _cleaned(part: Part, source: SourceBase, settings: Data) -> Tables:
    for piece in part.pieces:
        for table in source.read(part.source, piece, settings.on_bad_row):
            if len(table):
                yield clean(table, settings)
