"""Near-duplicate groups: which texts stand for one another, as files that any worker maps."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from f2llm_ray.data.keyed import KeyedStore, write_shard
from f2llm_ray.data.keys import Keys
from f2llm_ray.data.schema import key_array, key_numbers

NAMES = ("members-{:04d}.keys.npy", "members-{:04d}.groups.npy")


def write_members(folder: Path, shard: int, groups: pa.Table) -> None:
    """Writes the groups of the texts of one key range: `b`, a text, belongs to `a`, another one."""
    write_shard(folder, shard, NAMES, *(key_numbers(groups[name]) for name in ("b", "a")))


class Groups:
    """The group of each text: the key of the member that stands for it, its own where it has no near-duplicate.

    Args:
        folder: what `write_members` wrote, for every shard; None where near-duplicates were not looked for.
        shards: key ranges.
    """

    def __init__(self, folder: Path | None, shards: int) -> None:
        self._store = None if folder is None else KeyedStore(folder, shards, NAMES)

    def of(self, keys: Keys) -> Keys:
        """The group [n, 2] of each key [n, 2]."""
        found = keys.copy()
        if self._store is not None:
            self._store.fill(found, keys)
        return found

    def of_array(self, keys: pa.Array | pa.ChunkedArray) -> pa.Array:
        """The group of each of an array of keys."""
        return key_array(self.of(key_numbers(keys)))
