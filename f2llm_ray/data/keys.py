"""Keys: the ids of a row's texts, which stand for the texts in every later step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from f2llm_ray.data.ragged import Ints
from f2llm_ray.data.schema import KEY, key_array, key_numbers, query_text, seeded_key, text_key

Keys = np.ndarray[Any, np.dtype[np.uint64]]

# Added to the rows of `schema.ROW`. `instructed_key` is the query with its source's instruction before it.
KEYS = pa.schema(
    [
        ("row_key", KEY),
        ("query_key", KEY),
        ("instructed_key", KEY),
        ("passage_key", KEY),
        ("negative_keys", pa.list_(KEY)),
    ]
)


def add_keys(rows: pa.Table, instruction: str) -> pa.Table:
    """Adds the columns of `KEYS`. The same query and passage are the same row, whatever the source."""
    queries = rows["query"].to_pylist()
    query_keys = [text_key(text) for text in queries]
    passage_keys = [text_key(text) for text in rows["passage"].to_pylist()]
    columns = {
        "row_key": [seeded_key(*pair) for pair in zip(query_keys, passage_keys, strict=True)],
        "query_key": query_keys,
        "instructed_key": [text_key(query_text(text, instruction)) for text in queries],
        "passage_key": passage_keys,
        "negative_keys": [[text_key(text) for text in texts] for texts in rows["negatives"].to_pylist()],
    }
    for field in KEYS:
        rows = rows.append_column(field, pa.array(columns[field.name], field.type))
    return rows


def prompted(keys: pa.Array, prompt: str) -> pa.Array:
    """The ids of texts with a prompt before them, from those of the texts: other ones, unless the prompt is empty.

    A query and a passage that read the same have different tokens where their prompts differ. Taken twice, it
    gives the keys back.
    """
    if not prompt:
        return keys
    return key_array(key_numbers(keys) ^ key_numbers(pa.array([seeded_key("prompt", prompt)], KEY)))


def shard_of(keys: Keys, shards: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The key range [n] each key [n, 2] falls into; ranges are equal, and in the order of the keys."""
    top = (keys[:, 0] >> np.uint64(32)).astype(np.int64)
    return top * shards >> 32


def distinct_keys(keys: Keys) -> tuple[Keys, Ints]:
    """The distinct ones [m, 2] of keys [n, 2], rising, and the place of each key among them [n]."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    new = np.ones(len(keys), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    place = np.empty(len(keys), np.int64)
    place[order] = np.cumsum(new) - 1
    return ordered[new], place


def find_keys(ordered: Keys, keys: Keys) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The place [n] of each key in a sorted list of distinct ones, -1 where it is not there.

    Args:
        ordered: halves of the sorted keys [2, m]; may be mapped from disk, of which only what is compared is read.
        keys: the keys to find [n, 2].
    """
    high, low = ordered
    places = np.searchsorted(high, keys[:, 0])
    # Two keys with the same first half are not expected below 2^32 keys, but cost one comparison.
    while True:
        here = places < len(high)
        here[here] = high[places[here]] == keys[here, 0]
        later = here.copy()
        later[here] = low[places[here]] < keys[here, 1]
        if not later.any():
            break
        places = places + later
    here[here] = low[places[here]] == keys[here, 1]
    return np.where(here, places, -1)
