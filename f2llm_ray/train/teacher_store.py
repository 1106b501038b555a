"""The teacher's vectors of a stage's texts, on disk: each distinct text once, found by its key.

The keys fall into equal ranges. `<range>.keys.npy` [2, n] holds the sorted keys of one, `<range>-<piece>.npy`
[m, D] the vectors of `PIECE` of them, in their order, in float16 and before normalisation.

float16 has 11 bits: it moves a number by at most 0.05 %, and holds none above 65,504. A teacher with larger ones
is refused when it encodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from f2llm_ray.data.keyed import KeyedStore, read_meta
from f2llm_ray.data.keys import Keys, distinct_keys
from f2llm_ray.engine.vector_files import Halves
from f2llm_ray.model.dims import Vectors
from f2llm_ray.run.folder import Folder

Booleans = np.ndarray[Any, np.dtype[np.bool_]]
NAMES = ("{:04d}.keys.npy", "{:04d}-{:05d}.npy")
PIECE = 16_384
"""Texts per file of vectors: what a run that was cut off does again."""


def piece_file(shard: int, piece: int) -> str:
    """File with some of the vectors of a range."""
    return NAMES[1].format(shard, piece)


def write_keys(folder: Folder, shard: int, shards: int, parts: Iterable[Keys]) -> int:
    """Writes the distinct keys of range `shard` of `shards`, and returns how many it has.

    Each of `parts` has sorted keys [2, n] of all ranges, of which the range's own are read.
    """
    own = [np.ascontiguousarray(part[:, slice(*_bounds(part, shard, shards))].T) for part in parts]
    keys_n2, _ = distinct_keys(np.concatenate([np.empty((0, 2), np.uint64), *own]))
    folder.write_array(NAMES[0].format(shard), np.ascontiguousarray(keys_n2.T))
    return len(keys_n2)


def _bounds(part: Keys, shard: int, shards: int) -> tuple[int, int]:
    """First and last place of a range among sorted keys: key ranges are cut where `shard_of` cuts them."""
    edges = [np.uint64((-(-(number << 32) // shards)) << 32) for number in (shard, shard + 1) if number < shards]
    first, *last = np.searchsorted(part[0], edges)
    return int(first), int(last[0]) if last else part.shape[1]


def read_keys(folder: Folder, shard: int, piece: int) -> Keys:
    """The keys [m, 2] of one piece."""
    keys = folder.read_array(NAMES[0].format(shard))
    return np.ascontiguousarray(keys[:, piece * PIECE : (piece + 1) * PIECE].T)


def pieces(counts: dict[int, int]) -> Iterator[tuple[int, int, int]]:
    """Range, piece and number of texts of each file of vectors, from the number of keys of each range."""
    for shard, count in sorted(counts.items()):
        for first in range(0, count, PIECE):
            yield shard, first // PIECE, min(PIECE, count - first)


def trained_dims(facts: Mapping[str, Any]) -> tuple[int, ...]:
    """The dims that a teacher was trained for, from its store's facts; the last alone where they say no more."""
    return tuple(facts.get("trained") or [facts["dims"]])


class TeacherStore:
    """A finished store on a local disk; RunError where the folder is none."""

    def __init__(self, folder: Path) -> None:
        facts = read_meta(folder, "store of a teacher's vectors")
        self.shards, self.texts, self.dims = facts["shards"], facts["texts"], facts["dims"]
        self.nested = bool(facts["nested"])
        """Whether the first dims of a vector are one too."""
        self.folder = folder
        self._store = KeyedStore(folder, self.shards, NAMES, PIECE)

    def mean(self) -> Vectors:
        """The mean [D] of some vectors, a piece of one range: their keys are hashes, so they are any of them."""
        names = (piece_file(shard, 0) for shard in range(self.shards))
        path = next(self.folder / name for name in names if (self.folder / name).is_file())
        mean: Vectors = np.load(path).mean(axis=0, dtype=np.float64).astype(np.float32)
        return mean

    def known(self, keys: Keys) -> tuple[Halves, Booleans]:
        """Vectors [n, D] of keys [n, 2], NaN where a key is not in the store, and which are there [n]."""
        found = np.full((len(keys), self.dims), np.nan, np.float16)
        self._store.fill(found, keys)
        return found, ~np.isnan(found[:, 0])

    def lookup(self, keys: Keys) -> Halves:
        """Vectors [n, D] of keys [n, 2], in the given order.

        Raises:
            RunError: a key that is not in the store.
        """
        found = np.empty((len(keys), self.dims), np.float16)
        self._store.fill(found, keys, required="vector of the text")
        return found
