"""How much of an evaluation set is in the training rows: for sets that came after the data were prepared.

Shapes: n units of the set (queries, texts or pairs), D texts of it, h hits of a training row and a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.data.decontaminate import TEXTS_AT_ONCE, Screen, Screened, make_screen
from f2llm_ray.data.settings import Decontamination
from f2llm_ray.run.folder import Folder

Mask = np.ndarray[Any, np.dtype[np.bool_]]
HIT = pa.schema([("source", pa.string()), ("piece", pa.int64()), ("position", pa.int64()), ("text", pa.int64())])


class Overlap(NamedTuple):
    """What the training rows and a set have in common."""

    rows: int
    """Training rows, held-out ones included, that hold a text of the set, in a negative too."""
    units: Mask
    """Whether a training row holds what each unit asks [n]."""


def find_overlap(
    prepared: Folder, units: Sequence[Sequence[str]], screened: Screened, settings: Decontamination
) -> Overlap:
    """Looks for a set's texts in all training rows, as decontamination would have.

    Args:
        prepared: folder of the prepare stage.
        units: the texts of each unit that must not be trained on [n].
        screened: all such texts of the set, and its answers.
        settings: when a text counts as found.
    """
    import ray

    texts = list(dict.fromkeys(text for unit in units for text in unit))
    place = {text: index for index, text in enumerate(texts)}
    others = [text for text in screened.asked if text not in place]
    screen = make_screen({"set": Screened([*texts, *others], screened.answers)}, settings)
    rows = prepared / "rows"
    files = rows.files(".parquet")
    look = partial(_hits, rows=rows, screen=ray.put(screen))
    found = ray.data.from_items([{"file": file} for file in files], override_num_blocks=len(files)).map_batches(
        look, batch_size=1, batch_format="pyarrow"
    )
    tables = [table for table in ray.get(found.to_arrow_refs()) if table.num_columns]
    hits = _of_table(pa.concat_tables([HIT.empty_table(), *tables]), prepared / "table")
    rows_found = len(hits.group_by(["piece", "position"]).aggregate([]))
    held = np.zeros(max(len(texts), 1), bool)
    known = hits["text"].to_numpy()
    held[known[known < len(texts)]] = True
    return Overlap(rows_found, np.array([any(held[place[text]] for text in unit) for unit in units], dtype=bool))


def _hits(files: pa.Table, *, rows: Folder, screen: Any) -> pa.Table:
    """The hits in the rows of one part that were not taken out while they were read."""
    import ray

    (file,) = files["file"].to_pylist()
    index: Screen = ray.get(screen)
    found, first = [HIT.empty_table()], 0
    for table in rows.read_batches(file, ["source", "query", "passage", "negatives", "drop"]):
        position = np.flatnonzero(pc.is_null(table["drop"]).to_numpy(zero_copy_only=False))
        kept = table.take(pa.array(position))
        negatives = kept["negatives"].combine_chunks()
        rows_of = pc.list_parent_indices(negatives).to_numpy()
        texts = pc.list_flatten(negatives)
        looked = [(np.arange(len(kept)), kept[side]) for side in ("query", "passage")]
        looked += [
            (rows_of[at : at + TEXTS_AT_ONCE], texts.slice(at, TEXTS_AT_ONCE))
            for at in range(0, len(texts), TEXTS_AT_ONCE)
        ]
        for rows_at, said in looked:
            owner, text = index.held(said.to_pylist())
            owner = rows_at[owner]
            columns = [
                kept["source"].take(pa.array(owner)),
                pa.array(np.full(len(owner), int(file.partition(".")[0]))),
                pa.array(first + position[owner]),
                pa.array(text),
            ]
            found.append(pa.table(columns, schema=HIT))
        first += len(table)
    return pa.concat_tables(found)


def _of_table(hits: pa.Table, table: Folder) -> pa.Table:
    """The hits whose rows are still in after dedup and caps."""
    kept = [HIT.empty_table()]
    for source in hits["source"].unique().to_pylist():
        own = hits.filter(pc.equal(hits["source"], source))
        rows = table.read_table(f"{source}.parquet", ["piece", "position"])
        kept.append(own.filter(pa.array(np.isin(_places(own), _places(rows)))))
    return pa.concat_tables(kept)


def _places(rows: pa.Table) -> np.ndarray[Any, np.dtype[np.int64]]:
    places: np.ndarray[Any, np.dtype[np.int64]] = (rows["piece"].to_numpy() << 32) + rows["position"].to_numpy()
    return places
