"""Decontamination: training rows that hold a query of an evaluation set are tagged."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa


def decontaminate(rows: pa.Table, sets: Mapping[str, frozenset[bytes]]) -> pa.Table:
    """Tags rows whose query or passage is, after normalising, a query of a set.

    A set's passages may be trained on: the documents of a search are known beforehand, what is asked is not.

    Args:
        rows: rows with `keys.KEYS`.
        sets: keys of the queries of each evaluation set.
    """
    if not sets:
        return rows
    index = rows.schema.get_field_index("drop")
    drops = [
        drop
        or next(
            (f"decontaminate: {name}" for name, keys in sets.items() if query in keys or passage in keys), None
        )
        for drop, query, passage in zip(
            rows["drop"].to_pylist(), rows["query_key"].to_pylist(), rows["passage_key"].to_pylist(), strict=True
        )
    ]
    return rows.set_column(index, rows.schema.field(index), pa.array(drops, pa.string()))
