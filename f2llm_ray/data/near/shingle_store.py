"""The shingles of texts by the place of each, in files that any worker maps, and how much two texts share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from f2llm_ray.data.near.shingles import Hashes, Ragged, Shingles, distinct
from f2llm_ray.data.ragged import Ints, ranges


def write_shingles(folder: Path, part: int, shingles: Sequence[Shingles]) -> None:
    """Writes the shingles of a part's texts, in their order."""
    lengths = np.concatenate([np.diff(some.starts) for some in shingles])
    with (folder / f"{part:06d}.hashes").open("wb") as file:
        for some in shingles:
            file.write(some.hashes.astype("<u8").tobytes())
    np.save(folder / f"{part:06d}.starts.npy", np.append(0, np.cumsum(lengths)))


class ShingleStore:
    """The shingles in a folder, mapped as they are needed. A place is a part's number << 32 and a text's in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[int, tuple[np.ndarray[Any, Any], ...]] = {}

    def at(self, places: np.ndarray[Any, np.dtype[np.uint64]]) -> Ragged:
        """The distinct shingles at places [n], in their order."""
        parts = (places >> np.uint64(32)).astype(np.int64)
        texts = (places & np.uint64(0xFFFFFFFF)).astype(np.int64)
        lengths = np.zeros(len(places), np.int64)
        found: list[tuple[Ints, Ints, Hashes]] = []
        for part in np.unique(parts):
            starts, hashes = self._part(int(part))
            rows = np.flatnonzero(parts == part)
            first = starts[texts[rows]]
            lengths[rows] = starts[texts[rows] + 1] - first
            found.append((rows, first, hashes))
        flat = np.empty(int(lengths.sum()), np.uint64)
        begin = np.cumsum(lengths) - lengths
        for rows, first, hashes in found:
            flat[ranges(begin[rows], lengths[rows])] = hashes[ranges(first, lengths[rows])]
        return distinct(flat, lengths)

    def _part(self, part: int) -> tuple[np.ndarray[Any, Any], ...]:
        if part not in self._files:
            starts = np.load(self.folder / f"{part:06d}.starts.npy", mmap_mode="r")
            self._files[part] = (starts, np.memmap(self.folder / f"{part:06d}.hashes", "<u8", mode="r"))
        return self._files[part]


def jaccards(one: Ragged, other: Ragged) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Jaccard [n] of the n-th set of one side and the n-th of the other, as `distinct` gives them."""
    (one_hashes, one_lengths), (other_hashes, other_lengths) = one, other
    pair = np.arange(len(one_lengths))
    owner = np.repeat(np.tile(pair, 2), np.concatenate([one_lengths, other_lengths]))
    hashes = np.concatenate([one_hashes, other_hashes])
    order = np.lexsort((hashes, owner))
    owner, hashes = owner[order], hashes[order]
    same = (owner[1:] == owner[:-1]) & (hashes[1:] == hashes[:-1])
    common = np.bincount(owner[1:][same], minlength=len(pair))
    return common / (one_lengths + other_lengths - common)
