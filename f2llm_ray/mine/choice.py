"""Which of the nearest passages become a row's hard negatives.

Shapes: k nearest that were looked for, n rows of the table.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from f2llm_ray.mine.settings import Mine
from f2llm_ray.model.dims import Vectors

Mask = np.ndarray[Any, np.dtype[np.bool_]]

DROPPED = ("positive", "skip", "max_score", "margin")
"""Why a passage among the nearest is no negative of a row."""


def choose(score_nk: Vectors, positive_n: Vectors, settings: Mine) -> tuple[Mask, dict[str, int]]:
    """Which of the nearest passages are a row's negatives.

    Of the k nearest the first `skip` go, whatever their score; then those above a limit; of what is left the
    first `count` stay. The limits are those of sentence-transformers' `mine_hard_negatives`, in float32, and what
    equals a limit stays: a score s is kept where s <= max_score, s <= p - |p| * (1 - relative_margin) and
    s + absolute_margin <= p, with p the score of the row's own passage. The relative limit is p * relative_margin
    for every p >= 0; below 0 that product would allow passages nearer than the positive. One thing is different:
    their `range_min` skips after the limits, our `skip` before, as the ranks in the mined data of the paper's
    predecessor are counted.

    Args:
        score_nk: of the nearest passages that are no positives, falling; -inf where there were fewer than k.
        positive_n: score of each row's own passage.
        settings: `skip`, `count` and the limits.

    Returns:
        A mask [n, k], and how many fell to `skip`, `max_score` and `margin`, each by the first that applies.
    """
    left = score_nk > -np.inf
    dropped: dict[str, int] = {}

    def drop(reason: str, out: Mask) -> None:
        dropped[reason] = dropped.get(reason, 0) + int((left & out).sum())
        left[out] = False

    drop("skip", np.broadcast_to(np.arange(score_nk.shape[1]) < settings.skip, score_nk.shape))
    drop("max_score", score_nk > np.float32(settings.max_score))
    dropped["margin"] = 0
    if settings.relative_margin is not None:
        limit_n = positive_n - np.abs(positive_n) * np.float32(1 - settings.relative_margin)
        drop("margin", score_nk > limit_n[:, None])
    if settings.absolute_margin is not None:
        drop("margin", score_nk + np.float32(settings.absolute_margin) > positive_n[:, None])
    return left & (np.cumsum(left, axis=1) <= settings.count), dropped
