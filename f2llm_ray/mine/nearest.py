"""Exact nearest passages over tiles of scores, and the choice of hard negatives among them. Numpy only.

Shapes: q queries, p passages of one tile, k nearest that are looked for, n rows of the table.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from f2llm_ray.mine.settings import Mine

Floats = np.ndarray[Any, np.dtype[np.float32]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Packed = np.ndarray[Any, np.dtype[np.uint64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

LOWEST = np.finfo(np.float32).min
SIGN = np.uint32(1 << 31)
LOW_HALF = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
DROPPED = ("positive", "skip", "max_score", "margin")
"""Why a passage among the nearest is no negative of a row."""


def pack(scores: Floats, numbers: Ints) -> Packed:
    """One integer per candidate: the larger, the better. Equal scores are ordered by the smaller number.

    The bits of a float32 sort like the float once those of negative ones are flipped; they make the upper half.

    Args:
        scores: of each candidate, none of them NaN.
        numbers: of each candidate, below 2^32, in the same shape.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # adding 0 turns -0 into the 0 that it equals
    ordered = np.where(bits & SIGN, ~bits, bits | SIGN)
    return ordered.astype(np.uint64) << HALF | (LOW_HALF - numbers.astype(np.uint64))


def unpack(packed: Packed) -> tuple[Floats, Ints]:
    """Scores and numbers again; -inf and -1 where there was no candidate, which is the integer 0."""
    ordered = (packed >> HALF).astype(np.uint32)
    scores = np.where(ordered & SIGN, ordered ^ SIGN, ~ordered).view(np.float32)
    numbers = (LOW_HALF - (packed & LOW_HALF)).astype(np.int64)
    there = packed != 0
    return np.where(there, scores, np.float32(-np.inf)), np.where(there, numbers, -1)


def group_size(passages: int, k: int) -> int:
    """Passages per group of `group_floor`: about 2k groups, so that its bound lets few more than k through."""
    return max(1, passages // (2 * k))


def group_floor(scores_qp: Floats, k: int) -> Floats:
    """A score [q] that at least k of each query's scores reach, found without partitioning all of them.

    The scores fall into groups; the k-th largest of the groups' maxima is reached by k groups, so by k scores.
    Measured on one core, 1024 x 2048 scores, k 100: 0.5 ns a score; np.partition 1.6, torch.topk 21.

    Returns:
        The bounds, the lowest float32 where there are fewer than k passages.
    """
    queries, passages = scores_qp.shape
    if passages < k:
        return np.full(queries, LOWEST, np.float32)
    size = group_size(passages, k)
    groups = passages // size
    maxima = scores_qp[:, : groups * size].reshape(queries, size, groups).max(axis=1)
    return np.maximum(np.partition(maxima, groups - k, axis=1)[:, groups - k], LOWEST)


class Nearest:
    """The k nearest passages of each query among all that were offered, in whatever order and tiles they came.

    Args:
        queries: q.
        k: how many are kept for each.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.packed_qk: Packed = np.zeros((queries, k), np.uint64)
        self.floor_q: Floats = np.full(queries, LOWEST, np.float32)
        """Only a score at or above it can still come in."""

    def offer(self, scores_qp: Floats, first: int) -> None:
        """Takes what is near enough of one tile.

        Args:
            scores_qp: scores of the tile, -inf for passages that are out. After the first tiles few reach the
                floor, and the tile costs one comparison a score.
            first: number of the tile's first passage.
        """
        new = self.floor_q == LOWEST
        floor_q = np.maximum(self.floor_q, group_floor(scores_qp, self.k)) if new.any() else self.floor_q
        cells = np.flatnonzero(scores_qp >= floor_q[:, None])
        rows, columns = np.divmod(cells, scores_qp.shape[1])
        self.take(rows, columns + first, scores_qp.reshape(-1)[cells])

    def take(self, rows: Ints, numbers: Ints, scores: Floats) -> None:
        """Takes single candidates.

        Args:
            rows: the query of each, rising.
            numbers: the passage of each; no passage comes twice to a query.
            scores: finite.
        """
        if not len(rows):
            return
        counts = np.bincount(rows, minlength=len(self.packed_qk))
        active = np.flatnonzero(counts)
        widest = int(counts.max())
        place = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
        joined = np.zeros((len(active), self.k + widest), np.uint64)
        joined[:, widest:] = self.packed_qk[active]
        joined[(np.cumsum(counts > 0) - 1)[rows], place] = pack(scores, numbers)
        joined.partition(widest, axis=1)
        best = joined[:, widest:]
        self.packed_qk[active] = best
        lowest, _ = unpack(best.min(axis=1))
        self.floor_q[active] = np.maximum(lowest, LOWEST)

    def result(self) -> tuple[Floats, Ints]:
        """Scores and numbers [q, k], nearest first; -inf and -1 where fewer than k passages were offered."""
        return unpack(np.sort(self.packed_qk, axis=1)[:, ::-1])


def choose(scores_nk: Floats, positive_n: Floats, settings: Mine) -> tuple[Mask, dict[str, int]]:
    """Which of the nearest passages are a row's negatives.

    Of the k nearest the first `skip` go, whatever their score; then those above a limit; of what is left the
    first `count` stay. The limits are those of sentence-transformers' `mine_hard_negatives`, in float32, and what
    equals a limit stays: a score s is kept where s <= max_score, s <= p - |p| * (1 - relative_margin) and
    s + absolute_margin <= p, with p the score of the row's own passage. The relative limit is p * relative_margin
    for every p >= 0; below 0 that product would allow passages nearer than the positive. One thing is different:
    their `range_min` skips after the limits, our `skip` before, as the ranks in the mined data of the paper's
    predecessor are counted.

    Args:
        scores_nk: of the nearest passages that are no positives, falling; -inf where there were fewer than k.
        positive_n: score of each row's own passage.
        settings: `skip`, `count` and the limits.

    Returns:
        A mask [n, k], and how many fell to `skip`, `max_score` and `margin`, each by the first that applies.
    """
    left = scores_nk > -np.inf
    dropped: dict[str, int] = {}

    def drop(reason: str, out: Mask) -> None:
        dropped[reason] = dropped.get(reason, 0) + int((left & out).sum())
        left[out] = False

    drop("skip", np.broadcast_to(np.arange(scores_nk.shape[1]) < settings.skip, scores_nk.shape))
    drop("max_score", scores_nk > np.float32(settings.max_score))
    dropped["margin"] = 0
    if settings.relative_margin is not None:
        limit_n = positive_n - np.abs(positive_n) * np.float32(1 - settings.relative_margin)
        drop("margin", scores_nk > limit_n[:, None])
    if settings.absolute_margin is not None:
        drop("margin", scores_nk + np.float32(settings.absolute_margin) > positive_n[:, None])
    return left & (np.cumsum(left, axis=1) <= settings.count), dropped
