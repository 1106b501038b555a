"""Near-duplicate groups: which texts stand for one another, as files that any worker maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from f2llm_ray.data.keys import Keys, find_keys, shard_of
from f2llm_ray.data.schema import KEY, key_numbers


def write_members(folder: Path, shard: int, groups: pa.Table) -> None:
    """Writes the groups of the texts of one key range: `b`, a text, belongs to `a`, another one."""
    groups = groups.sort_by("b")
    np.save(members_file(folder, shard), np.concatenate([key_numbers(groups["b"]).T, key_numbers(groups["a"]).T]))


class Groups:
    """The group of each text: the key of the member that stands for it, its own where it has no near-duplicate.

    Args:
        folder: what `write_members` wrote, for every shard; None where near-duplicates were not looked for.
        shards: key ranges.
    """

    def __init__(self, folder: Path | None, shards: int) -> None:
        self.folder, self.shards = folder, shards
        self._members: dict[int, np.ndarray[Any, np.dtype[np.uint64]]] = {}

    def of(self, keys: Keys) -> Keys:
        """The group [n, 2] of each key [n, 2]."""
        if self.folder is None or not len(keys):
            return keys
        found = keys.copy()
        shards = shard_of(keys, self.shards)
        for shard in np.unique(shards):
            if shard not in self._members:
                self._members[shard] = np.load(members_file(self.folder, int(shard)), mmap_mode="r")
            members = self._members[shard]
            rows = np.flatnonzero(shards == shard)
            places = find_keys(members[:2], keys[rows])
            rows, places = rows[places >= 0], places[places >= 0]
            found[rows] = members[2:, places].T
        return found

    def of_array(self, keys: pa.Array | pa.ChunkedArray) -> pa.Array:
        """The group of each of an array of keys."""
        return key_array(self.of(key_numbers(keys)))


def key_array(keys: Keys) -> pa.Array:
    """Halves of keys [n, 2] as an arrow array; the inverse of `key_numbers`."""
    return pa.Array.from_buffers(KEY, len(keys), [None, pa.py_buffer(np.ascontiguousarray(keys, ">u8").tobytes())])


def members_file(folder: Path, shard: int) -> Path:
    """The file of one key range."""
    return folder / f"members-{shard:04d}.npy"
