"""Reading: the one pass over the text. Each part is read, cleaned, keyed, decontaminated and written."""

from __future__ import annotations

from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.data.account import Counts, count_tags
from f2llm_ray.data.clean import clean
from f2llm_ray.data.decontaminate import decontaminate
from f2llm_ray.data.flow import Part, Tables, checked, map_parts, parts_of
from f2llm_ray.data.keys import KEYS, add_keys
from f2llm_ray.data.schema import ROW
from f2llm_ray.data.sources.base import SourceBase
from f2llm_ray.progress import Progress
from f2llm_ray.recipe import Data, Recipe
from f2llm_ray.run import Folder

WRITTEN = pa.schema([*ROW, *KEYS])
PAIR = ["query", "passage", "language"]


def write_rows(
    recipe: Recipe, parts: list[Part], queries_of_sets: dict[str, frozenset[bytes]], rows: Folder
) -> Counts:
    """Writes the rows of every part with all their tags, and counts them by source, language and tag.

    A part that an earlier try has written is not read again.

    Args:
        recipe: the run's recipe.
        parts: the parts of its sources.
        queries_of_sets: keys of the queries of each evaluation set.
        rows: folder that gets one file per part.
    """
    write = partial(_write_part, recipe=recipe, queries_of_sets=queries_of_sets, rows=rows)
    counts = Counts()
    progress = Progress("prepare: read", len(parts), "parts")
    done = 0
    for batch in checked(map_parts(parts, write).iter_batches(batch_size=None, batch_format="pyarrow")):
        for row in batch.to_pylist():
            counts.add(row)
            done += row["last"]
        progress.update(done, f"{counts.rows:,} rows")
    return counts


def _write_part(
    part: Part, *, recipe: Recipe, queries_of_sets: dict[str, frozenset[bytes]], rows: Folder
) -> Tables:
    source = recipe.sources[part.source]
    if not rows.exists(part.file):
        tables = (
            decontaminate(add_keys(table, source.query_instruction), queries_of_sets).cast(WRITTEN)
            for table in _cleaned(part, source, recipe.data)
        )
        rows.write_table(part.file, tables, WRITTEN)
    counts = count_tags(rows.read_table(part.file, ["source", "language", "drop"]))
    if not len(counts):  # the part still has to be counted as done
        nothing = {"source": [part.source], "language": [None], "drop": [None], "rows": [0]}
        counts = pa.table(nothing, counts.schema)
    yield counts.append_column("last", pa.array([0] * (len(counts) - 1) + [1]))


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
