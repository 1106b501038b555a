"""Vectors in fewer bits: int8 by ranges per dim, and one bit per dim.

The values are those of sentence-transformers' `quantize_embeddings`, but that int8 rounds to the nearest step and a
value outside its range stays at the range's end, where theirs cuts towards zero and wraps around.
Shapes: n vectors, d dims.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from f2llm_ray.model.dims import Vectors

Int8 = np.ndarray[Any, np.dtype[np.int8]]
Uint8 = np.ndarray[Any, np.dtype[np.uint8]]


def calibrate(vectors_nd: Vectors) -> Vectors:
    """Ranges [2, d] for `to_int8`: the smallest and the largest value of each dim over sample vectors."""
    ranges_2d: Vectors = np.stack([vectors_nd.min(axis=0), vectors_nd.max(axis=0)])
    return ranges_2d


def to_int8(vectors_nd: Vectors, ranges_2d: Vectors) -> Int8:
    """Steps of 1/255 of each dim's range [n, d], from -128 at its start to 127 at its end."""
    start_d, end_d = ranges_2d
    step_d = np.maximum((end_d - start_d) / 255, np.finfo(np.float32).tiny)
    return np.clip(np.rint((vectors_nd - start_d) / step_d - 128), -128, 127).astype(np.int8)


def to_ubinary(vectors_nd: Vectors) -> Uint8:
    """One bit per dim, whether it is above 0, eight to a byte [n, ceil(d / 8)], the first dim in the highest bit."""
    return np.packbits(vectors_nd > 0, axis=1)


def to_binary(vectors_nd: Vectors) -> Int8:
    """`to_ubinary` less 128 as int8 [n, ceil(d / 8)], for stores that have no unsigned bytes."""
    return (to_ubinary(vectors_nd).astype(np.int16) - 128).astype(np.int8)
