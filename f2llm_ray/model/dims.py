"""Smaller forms of unit vectors: their first dims; int8 and packed signs as in sentence-transformers.

Shapes: n texts, d dims of the vector, b = ceil(d / 8) bytes of signs.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

Vectors = np.ndarray[Any, np.dtype[np.float32]]
Quantized = np.ndarray[Any, np.dtype[Any]]
EmbeddingType = Literal["float", "int8", "binary", "ubinary"]
EMBEDDING_TYPES: tuple[EmbeddingType, ...] = get_args(EmbeddingType)


def cut_dims(vectors_nd: Vectors, dim: int) -> Vectors:
    """Unit vectors [n, dim] of the first dims of unit vectors, as if the raw ones were cut; zero stays zero."""
    if dim == vectors_nd.shape[1]:
        return vectors_nd
    return unit(vectors_nd[:, :dim])


def unit(vectors_nd: Vectors) -> Vectors:
    """The vectors [n, d] scaled to length 1; zero stays zero."""
    norm_n1 = np.linalg.norm(vectors_nd, axis=1, keepdims=True)
    scaled: Vectors = vectors_nd / np.maximum(norm_n1, np.finfo(np.float32).tiny)
    return scaled


def dequantize_int8(codes_nd: Quantized, ranges_2d: Vectors) -> Vectors:
    """The vectors [n, d] that int8 codes stand for, the middle of each step."""
    low_d, high_d = ranges_2d.astype(np.float32)
    return low_d + (codes_nd.astype(np.float32) + 128.5) * ((high_d - low_d) / 255)


def quantize_vectors(vectors_nd: Vectors, kind: EmbeddingType, ranges_2d: Vectors | None = None) -> Quantized:
    """The vectors in one form, little-endian.

    Args:
        vectors_nd: unit vectors.
        kind: "float" [n, d] float32; "int8" [n, d], 255 equal steps between the least and the greatest value of
            each dim, values outside clipped; "ubinary" [n, b] uint8, the sign bits packed; "binary" [n, b] int8,
            the same less 128.
        ranges_2d: least and greatest value of each dim, for "int8" alone.

    Raises:
        ValueError: int8 without ranges of this many dims.
    """
    if kind == "float":
        return np.ascontiguousarray(vectors_nd, dtype="<f4")
    if kind == "int8":
        if ranges_2d is None or ranges_2d.shape[1] != vectors_nd.shape[1]:
            raise ValueError(f"int8 needs ranges of {vectors_nd.shape[1]} dims")
        low_d, high_d = ranges_2d.astype(np.float32)
        step_d = (high_d - low_d) / 255
        step_d = np.where(step_d == 0, np.float32(1), step_d)  # a dim that never moves
        return (np.clip(np.floor((vectors_nd - low_d) / step_d), 0, 255) - 128).astype(np.int8)
    signs_nb = np.packbits(vectors_nd > 0, axis=-1)
    return signs_nb if kind == "ubinary" else (signs_nb - np.uint8(128)).view(np.int8)
