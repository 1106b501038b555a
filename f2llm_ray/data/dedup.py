"""Dedup: of rows that are equal, or whose query and passage are both near-equal, one stays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SAME, NEAR = "dedup: same row", "near_dedup: near-equal row"


def dedup(ids: pa.Table) -> pa.Table:
    """Tags all but one of the rows whose query and passage belong to the same groups.

    Two answers to one question, or one label of two texts, are different rows: both sides must be near-equal. The
    row of the first source in the recipe stays, there the one whose language, and then whose key, comes first:
    nothing in that depends on the order of the rows or on how they were spread over workers.

    Args:
        ids: columns row_key, query_group, passage_group, source_rank, language, piece, position, and any others.

    Returns:
        The rows sorted by groups, with the columns `drop` (`SAME`, `NEAR` or null) and `kept_piece`,
        `kept_position`: the place of the row that stays for each.
    """
    names = ("query_group", "passage_group", "source_rank", "language", "row_key", "piece", "position")
    ids = ids.sort_by([(name, "ascending") for name in names]).combine_chunks()
    first = np.ones(len(ids), bool)
    query, passage = (ids[name].combine_chunks() for name in names[:2])
    changed = pc.or_(pc.not_equal(query[1:], query[:-1]), pc.not_equal(passage[1:], passage[:-1]))
    first[1:] = changed.to_numpy(zero_copy_only=False)
    head = pa.array(np.flatnonzero(first)[np.cumsum(first) - 1])
    codes = ids["row_key"].combine_chunks().dictionary_encode().indices.to_numpy()
    again = np.ones(len(ids), bool)
    again[np.unique(codes, return_index=True)[1]] = False
    drop = pc.if_else(pa.array(first), pa.scalar(None, pa.string()), pc.if_else(pa.array(again), SAME, NEAR))
    return (
        ids.append_column("drop", drop)
        .append_column("kept_piece", ids["piece"].take(head))
        .append_column("kept_position", ids["position"].take(head))
    )
