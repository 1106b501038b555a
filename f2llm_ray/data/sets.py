"""The shingles of texts that may be near-duplicates, in files that any worker maps, and what two share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.data.keys import Keys, find_keys, shard_of
from f2llm_ray.data.ragged import Ints, ranges
from f2llm_ray.data.schema import key_numbers
from f2llm_ray.data.shingles import Hashes

Ragged = tuple[Hashes, Ints]
"""Sets end to end [S], each sorted, and the length of each [n]."""


def write_sets(folder: Path, shard: int, sets: pa.Table) -> None:
    """Writes the sets of one key range.

    Args:
        folder: where they go.
        shard: the key range.
        sets: columns key and hashes (sorted, distinct); a key that stands twice is written once.
    """
    sets = sets.sort_by("key").combine_chunks()
    keys = key_numbers(sets["key"])
    first = np.append(True, (keys[1:] != keys[:-1]).any(axis=1))
    hashes = sets["hashes"].combine_chunks().filter(pa.array(first))
    lengths = pc.list_value_length(hashes).to_numpy().astype(np.int64)
    np.save(folder / f"{shard:04d}.keys.npy", np.ascontiguousarray(keys[first].T))
    np.save(folder / f"{shard:04d}.starts.npy", np.append(0, np.cumsum(lengths)))
    np.save(folder / f"{shard:04d}.hashes.npy", hashes.flatten().to_numpy())


class Sets:
    """The sets in a folder, mapped as they are needed."""

    def __init__(self, folder: Path, shards: int) -> None:
        self.folder, self.shards = folder, shards
        self._files: dict[int, tuple[np.ndarray[Any, Any], ...]] = {}

    def of(self, keys: Keys) -> Ragged:
        """The sets of keys [n, 2], in their order; every key must have one."""
        shards = shard_of(keys, self.shards)
        lengths = np.zeros(len(keys), np.int64)
        found: list[tuple[Ints, Ints, Hashes]] = []
        for shard in np.unique(shards):
            ordered, starts, hashes = self._shard(int(shard))
            rows = np.flatnonzero(shards == shard)
            places = find_keys(ordered, keys[rows])
            lengths[rows] = starts[places + 1] - starts[places]
            found.append((rows, starts[places], hashes))
        flat = np.empty(int(lengths.sum()), np.uint64)
        begin = np.cumsum(lengths) - lengths
        for rows, starts, hashes in found:
            flat[ranges(begin[rows], lengths[rows])] = hashes[ranges(starts, lengths[rows])]
        return flat, lengths

    def _shard(self, shard: int) -> tuple[np.ndarray[Any, Any], ...]:
        if shard not in self._files:
            names = ("keys", "starts", "hashes")
            self._files[shard] = tuple(
                np.load(self.folder / f"{shard:04d}.{name}.npy", mmap_mode="r") for name in names
            )
        return self._files[shard]


def jaccards(one: Ragged, other: Ragged) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Jaccard [n] of the n-th set of one side and the n-th of the other."""
    (one_hashes, one_lengths), (other_hashes, other_lengths) = one, other
    pair = np.arange(len(one_lengths))
    owner = np.concatenate([np.repeat(pair, one_lengths), np.repeat(pair, other_lengths)])
    hashes = np.concatenate([one_hashes, other_hashes])
    order = np.lexsort((hashes, owner))
    owner, hashes = owner[order], hashes[order]
    same = (owner[1:] == owner[:-1]) & (hashes[1:] == hashes[:-1])
    common = np.bincount(owner[1:][same], minlength=len(pair))
    return common / (one_lengths + other_lengths - common)
