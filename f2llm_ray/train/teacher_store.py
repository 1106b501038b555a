"""The teacher's vectors of a stage's texts, on disk: each distinct text once, found by its key.

The keys fall into equal ranges. `<range>.keys.npy` [2, n] holds the sorted keys of one, `<range>-<piece>.npy`
[m, D] the vectors of `PIECE` of them, in their order, in float16 and before normalisation. A look-up is one binary
search in a mapped array and one read; nothing is held in memory.

float16 has 11 bits: it moves a number by at most 0.05 %, and holds none above 65,504. A teacher with larger ones
is refused when it encodes.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.keys import Keys, distinct_keys, find_keys, shard_of
from f2llm_ray.engine.vector_files import Halves
from f2llm_ray.run.folder import Folder

META = "store.json"
PIECE = 16_384
"""Texts per file of vectors: what a run that was cut off does again."""
OPEN_FILES = 512
"""Files that a reader keeps mapped; a system allows 1,024 in all by default."""


def keys_file(shard: int) -> str:
    """File with the keys of a range."""
    return f"{shard:04d}.keys.npy"


def piece_file(shard: int, piece: int) -> str:
    """File with some of the vectors of a range."""
    return f"{shard:04d}-{piece:05d}.npy"


def write_keys(folder: Folder, shard: int, shards: int, parts: Iterable[Keys]) -> int:
    """Writes the distinct keys of one range.

    Args:
        folder: the store.
        shard: which range.
        shards: number of ranges.
        parts: sorted keys [2, n] of all ranges, of which the range's own are read.

    Returns:
        How many it has.
    """
    own = [np.ascontiguousarray(part[:, slice(*_bounds(part, shard, shards))].T) for part in parts]
    keys_n2, _ = distinct_keys(np.concatenate([np.empty((0, 2), np.uint64), *own]))
    folder.write_array(keys_file(shard), np.ascontiguousarray(keys_n2.T))
    return len(keys_n2)


def _bounds(part: Keys, shard: int, shards: int) -> tuple[int, int]:
    """First and last place of a range among sorted keys: key ranges are cut where `shard_of` cuts them."""
    edges = [np.uint64((-(-(number << 32) // shards)) << 32) for number in (shard, shard + 1) if number < shards]
    first, *last = np.searchsorted(part[0], edges)
    return int(first), int(last[0]) if last else part.shape[1]


def read_keys(folder: Folder, shard: int, piece: int) -> Keys:
    """The keys [m, 2] of one piece."""
    keys = folder.read_array(keys_file(shard))
    return np.ascontiguousarray(keys[:, piece * PIECE : (piece + 1) * PIECE].T)


def pieces(counts: dict[int, int]) -> Iterator[tuple[int, int, int]]:
    """Range, piece and number of texts of each file of vectors, from the number of keys of each range."""
    for shard, count in sorted(counts.items()):
        for first in range(0, count, PIECE):
            yield shard, first // PIECE, min(PIECE, count - first)


def write_meta(folder: Folder, *, shards: int, texts: int, dims: int) -> None:
    """Writes what a reader must know, when all else is there."""
    folder.write_json(META, {"shards": shards, "texts": texts, "dims": dims})


class TeacherStore:
    """A finished store on a local disk.

    Raises:
        RunError: the folder is none.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / META).is_file():
            raise RunError(f"{folder}: not a finished store of a teacher's vectors: it has no {META}")
        meta = json.loads((folder / META).read_text())
        self.folder = folder
        self.shards: int = meta["shards"]
        self.texts: int = meta["texts"]
        self.dims: int = meta["dims"]
        self._open: OrderedDict[str, np.ndarray] = OrderedDict()

    def lookup(self, keys: Keys) -> Halves:
        """Vectors [n, D] of keys [n, 2], in the given order.

        Raises:
            RunError: a key that is not in the store.
        """
        found = np.empty((len(keys), self.dims), np.float16)
        shards = shard_of(keys, self.shards)
        for shard in np.unique(shards).tolist():
            rows = np.flatnonzero(shards == shard)
            places = find_keys(self._file(keys_file(shard)), keys[rows])
            if (places < 0).any():
                high, low = (int(half) for half in keys[rows[places < 0][0]])
                raise RunError(f"{self.folder}: no vector of the text with key {high:016x}{low:016x}")
            for piece in np.unique(places // PIECE).tolist():
                here = places // PIECE == piece
                found[rows[here]] = self._file(piece_file(shard, piece))[places[here] % PIECE]
        return found

    def _file(self, name: str) -> np.ndarray:
        if name in self._open:
            self._open.move_to_end(name)
        else:
            if len(self._open) == OPEN_FILES:
                self._open.popitem(last=False)
            self._open[name] = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        return self._open[name]
