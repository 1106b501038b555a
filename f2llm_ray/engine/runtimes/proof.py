"""The proof of an export: a runtime's vectors of the golden texts, alone and in batches, beside the model's own.

Shapes: n texts of a batch, t places of its longest, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine.runtimes.golden import Golden, shown
from f2llm_ray.model.dims import Vectors, cut_dims

Ints = np.ndarray[Any, np.dtype[np.int64]]
Run = Callable[[Ints, Ints], Vectors]
"""A runtime: ids and mask [n, t] in, one output out: unit vectors [n, d], or hidden states [n, t, d]."""
Side = Literal["right", "left"]
SIDES: tuple[Side, ...] = get_args(Side)
"""That a batch is padded on."""

SIZES = (1, 2, 7, 32)
"""Texts of a batch."""
TOKENS = 2048
"""Most places of a batch of several texts: long ones come in small batches."""
SAME = 0.99999
"""Least cosine of a text's vectors in two batches."""


@dataclass(frozen=True)
class Bounds:
    """What is asked of the cosines of a file's vectors with the model's own."""

    least: float
    mean: float
    every_dim: bool = True
    """Else of whole vectors alone; those of other dims are only noted."""


FLOAT = Bounds(0.99999, 0.99999)
INT8 = Bounds(0.998, 0.9993, every_dim=False)
"""Of int8 weights with float32 activations."""


def prove(
    run: Run,
    golden: Golden,
    dims: Sequence[int],
    bounds: Bounds,
    place: str,
    *,
    sizes: Sequence[int] = SIZES,
    sides: Sequence[Side] = SIDES,
) -> dict[str, Any]:
    """Runs the golden texts and compares, in float32 at every dim.

    Returns:
        Numbers of texts and batches, and the cosines: `least` and `mean` at the whole dim, `least_by_dim`, and
        `same`, the least between a text alone and in a batch.

    Raises:
        RunError: a vector is not finite, is too far from the model's, or depends on its batch; the message shows
            the worst text.
    """
    tokens = golden.tokens[: len(golden.vectors_vd)]
    alone_nd = np.zeros_like(golden.vectors_vd)
    cosines = {dim: list[float]() for dim in dims}
    same, batches = 1.0, 0
    asked = dims if bounds.every_dim else dims[-1:]
    for chosen, side in plan(tokens, sizes, sides):
        found_nd = run(*padded([tokens[i] for i in chosen], side))
        batches += 1
        said = f"(a batch of {len(chosen)}, padded {side})"
        if found_nd.shape != (len(chosen), golden.vectors_vd.shape[1]):
            raise RunError(
                f"{place}: vectors of shape {found_nd.shape}, expected {golden.vectors_vd[chosen].shape}"
            )
        broken = np.flatnonzero(~np.isfinite(found_nd).all(1))
        if len(broken):
            raise RunError(
                f"{place}: a vector that is not finite for {shown(golden.texts[chosen[broken[0]]])} {said}"
            )
        for dim in dims:
            cosine_n = cosine(cut_dims(found_nd, dim), cut_dims(golden.vectors_vd[chosen], dim))
            cosines[dim] += cosine_n.tolist()
            worst = int(cosine_n.argmin())
            if dim in asked and cosine_n[worst] < bounds.least:
                raise RunError(
                    f"{place}: the vector of {shown(golden.texts[chosen[worst]])} {said} has cosine "
                    f"{cosine_n[worst]:.6f} at {dim} dims with the model's own, expected at least {bounds.least}"
                )
        if len(chosen) == 1:
            alone_nd[chosen] = found_nd
        cosine_n = cosine(found_nd, alone_nd[chosen])
        same = min(same, float(cosine_n.min()))
        if same < SAME:
            raise RunError(
                f"{place}: the vector of {shown(golden.texts[chosen[int(cosine_n.argmin())]])} {said} has cosine "
                f"{same:.6f} with that of the text alone, at least {SAME} is expected"
            )
    for dim, found in cosines.items():
        if dim in asked and np.mean(found) < bounds.mean:
            raise RunError(
                f"{place}: mean cosine {np.mean(found):.6f} at {dim} dims with the model's own vectors, at least "
                f"{bounds.mean} is expected"
            )
    return {
        "texts": len(tokens),
        "batches": batches,
        "longest": max(map(len, tokens)),
        "least": round(min(cosines[dims[-1]]), 7),
        "mean": round(float(np.mean(cosines[dims[-1]])), 7),
        "least_by_dim": {str(dim): round(min(found), 7) for dim, found in cosines.items()},
        "same": round(same, 7),
    }


def plan(
    tokens: Sequence[Tokens], sizes: Sequence[int] = SIZES, sides: Sequence[Side] = SIDES
) -> Iterator[tuple[list[int], Side]]:
    """Batches of texts, each of mixed lengths and padded on all sides; every text comes alone first (size 1)."""
    for size in sizes:
        fitting = [i for i, ids in enumerate(tokens) if size == 1 or size * len(ids) <= TOKENS]
        order = np.random.default_rng(size).permutation(fitting).tolist()
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            for side in sides if size > 1 else sides[:1]:
                yield chosen, side


def padded(tokens: Sequence[Tokens], side: Side) -> tuple[Ints, Ints]:
    """Ids and mask [n, t] of a batch."""
    longest = max(map(len, tokens))
    ids_nt, mask_nt = (np.zeros((len(tokens), longest), np.int64) for _ in range(2))
    for row, text in enumerate(tokens):
        here = slice(0, len(text)) if side == "right" else slice(longest - len(text), longest)
        ids_nt[row, here], mask_nt[row, here] = text, 1
    return ids_nt, mask_nt


def cosine(one_nd: Vectors, other_nd: Vectors) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Cosines [n] of the rows of two matrices, in float64."""
    a, b = one_nd.astype(np.float64), other_nd.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.sum(a * b, axis=1) / np.maximum(norms, np.finfo(np.float32).tiny)
