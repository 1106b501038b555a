"""Exact dedup: of equal rows one stays, the same one whatever the order they come in."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc


def dedup(ids: pa.Table) -> pa.Table:
    """Tags all but one of the rows with the same `row_key`.

    The row of the first source in the recipe stays, there the one whose language, and then whose place, comes
    first: nothing in that depends on how the rows were spread over workers.

    Args:
        ids: columns row_key, source_rank, language, piece, position, drop (all null), and any others.

    Returns:
        The rows sorted by row_key, `drop` set to "dedup: same row" on duplicates.
    """
    order = [(name, "ascending") for name in ("row_key", "source_rank", "language", "piece", "position")]
    ids = ids.sort_by(order)
    keys = ids["row_key"].combine_chunks()
    if len(keys) < 2:
        return ids
    same = pa.concat_arrays([pa.array([False]), pc.equal(keys[1:], keys[:-1])])
    tags = pc.if_else(same, pa.scalar("dedup: same row"), pa.scalar(None, pa.string()))
    index = ids.schema.get_field_index("drop")
    return ids.set_column(index, ids.schema.field(index), tags)
