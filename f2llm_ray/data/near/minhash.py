"""MinHash signatures and their bands: two texts share a band with a probability that their Jaccard decides.

Shapes: T texts, S shingles, K permutations = bands * rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from f2llm_ray.data.near.shingles import Hashes, Shingles, mixed
from f2llm_ray.data.ragged import Ints
from f2llm_ray.data.schema import rng
from f2llm_ray.data.settings import Preset

Signatures = np.ndarray[Any, np.dtype[np.uint32]]

# Shingles worked on at once: their products stay in the second-level cache. 2,048 to 65,536 measured; 16,384 best.
BLOCK = 16_384


@dataclass(frozen=True)
class Lsh:
    """How signatures are cut: two texts are candidates when all rows of any band agree."""

    bands: int
    rows: int

    def probability(self, jaccard: float) -> float:
        """Chance that two texts of this Jaccard become candidates: 1 - (1 - j^rows)^bands."""
        return float(1 - (1 - jaccard**self.rows) ** self.bands)


PRESETS: dict[Preset, Lsh] = {
    "loose": Lsh(20, 5),  # half of the pairs at 0.51, 0.99 of them at 0.73
    "standard": Lsh(14, 8),  # half at 0.69, 0.99 at 0.86; datatrove's and FineWeb's
    "strict": Lsh(9, 13),  # half at 0.82, 0.99 at 0.93
}


def signatures(shingles: Shingles, permutations: int) -> Signatures:
    """The MinHash signature [T, K] of each text.

    A permutation is x -> a * x + b modulo 2^64 with odd a, of hashes that are mixed already; the upper half of its
    minimum is kept.
    """
    generator = rng("minhash", permutations)
    multiplier = generator.integers(0, 2**64, size=permutations, dtype=np.uint64) | np.uint64(1)
    shift = generator.integers(0, 2**64, size=permutations, dtype=np.uint64)
    result = np.empty((permutations, len(shingles.tokens)), np.uint64)
    for first, last in _blocks(shingles.starts):
        start, stop = shingles.starts[first], shingles.starts[last]
        hashes, starts = shingles.hashes[start:stop], shingles.starts[first:last] - start
        product = np.empty_like(hashes)
        for k in range(permutations):
            np.multiply(hashes, multiplier[k], out=product)
            np.add(product, shift[k], out=product)
            np.minimum.reduceat(product, starts, out=result[k, first:last])
    return (result >> np.uint64(32)).astype(np.uint32).T


def band_keys(signature: Signatures, lsh: Lsh) -> Hashes:
    """A 64-bit key [T, bands] for the rows of each band, different between bands."""
    rows = signature.reshape(len(signature), lsh.bands, lsh.rows).astype(np.uint64)
    keys = np.broadcast_to(np.arange(1, lsh.bands + 1, dtype=np.uint64), rows.shape[:2])
    for row in range(lsh.rows):
        keys = mixed(keys ^ rows[:, :, row])
    return keys


def _blocks(starts: Ints) -> Iterator[tuple[int, int]]:
    """Ranges of texts with about `BLOCK` shingles each."""
    first, texts = 0, len(starts) - 1
    while first < texts:
        last = int(np.searchsorted(starts, starts[first] + BLOCK, side="right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last
