"""Negatives for classification: the other labels of the source."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from f2llm_ray.data.keys import KEYS
from f2llm_ray.data.schema import rng


def label_negatives(ids: pa.Table, *, source: str, seed: int, count: int = 24) -> pa.Table:
    """Gives rows that brought no negatives the keys of other labels (paper: a label text is the negative).

    A classification source's passages are its labels. Up to `count` others (paper: 24 per row) are drawn for each
    row, among those written in the same passage language where the source has several.

    Args:
        ids: rows of one classification source, with row_key, passage_key, passage_language, negative_keys.
        source: its name, part of the seed.
        seed: the recipe's.
        count: most negatives per row.
    """
    languages = np.array([language or "" for language in ids["passage_language"].to_pylist()])
    given = ids["negative_keys"].to_pylist()
    labels = ids["passage_key"].to_pylist()
    pools = {
        language: sorted({labels[row] for row in np.flatnonzero(languages == language)})
        for language in np.unique(languages)
    }
    start = rng(seed, source, "labels").integers(0, 2**31, size=len(labels))
    negatives = []
    for row, label in enumerate(labels):
        pool = pools[languages[row]]
        if given[row] or len(pool) < 2:
            negatives.append(given[row])
            continue
        # A stretch of the sorted (hash-ordered) labels from a random place on, the row's own left out.
        place = [pool[(int(start[row]) + i) % len(pool)] for i in range(min(count + 1, len(pool)))]
        negatives.append([other for other in place if other != label][:count])
    index = ids.schema.get_field_index("negative_keys")
    field = KEYS.field("negative_keys")
    return ids.set_column(index, field, pa.array(negatives, field.type))
