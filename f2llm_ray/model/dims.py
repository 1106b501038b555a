"""Cutting unit vectors to their first dims."""

from __future__ import annotations

from typing import Any

import numpy as np

Vectors = np.ndarray[Any, np.dtype[np.float32]]


def cut_dims(vectors_nd: Vectors, dim: int) -> Vectors:
    """Unit vectors [n, dim] of the first dims of unit vectors, as if the raw ones were cut; zero stays zero."""
    if dim == vectors_nd.shape[1]:
        return vectors_nd
    cut_nd = vectors_nd[:, :dim]
    norm_n1 = np.linalg.norm(cut_nd, axis=1, keepdims=True)
    cut: Vectors = cut_nd / np.maximum(norm_n1, np.finfo(np.float32).tiny)
    return cut
