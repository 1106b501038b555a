"""The choice of negatives among the nearest passages is what its limits say, row by row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_ray.mine.search import choose
from f2llm_ray.mine.settings import Mine


def chosen_slowly(scores: list[float], positive: float, limits: Mine) -> tuple[list[int], dict[str, int]]:
    """The reference for one row, in float32 like the rule itself."""
    kept, dropped = [], {"skip": 0, "max_score": 0, "margin": 0}
    one, own = np.float32, np.float32(positive)
    for rank, score in enumerate(map(one, scores)):
        if score == -np.inf:
            break
        if rank < limits.skip:
            dropped["skip"] += 1
        elif score > one(limits.max_score):
            dropped["max_score"] += 1
        elif (limits.relative_margin is not None and score > own - abs(own) * one(limits.relative_margin)) or (
            limits.absolute_margin is not None and score + one(limits.absolute_margin) > own
        ):
            dropped["margin"] += 1
        else:
            kept.append(rank)
    return kept[: limits.count], dropped


MARGINS = st.one_of(st.none(), st.sampled_from([0.25, 0.5, 0.95, 1.0]))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 20), st.integers(0, 6), st.integers(1, 9), MARGINS, MARGINS,
    st.sampled_from([0.25, 0.5, 0.8, 1.0]),
)  # fmt: skip
def test_choice_is_that_of_a_loop_over_rows(
    seed: int, k: int, skip: int, count: int, relative: float | None, absolute: float | None, max_score: float
) -> None:
    limits = Mine(
        model="m", count=count, top_k=100, skip=skip, max_score=max_score, relative_margin=relative,
        absolute_margin=absolute,
    )  # fmt: skip
    generator = np.random.default_rng(seed)
    scores = -np.sort(-generator.integers(-4, 5, (7, k)).astype(np.float32) / 4, axis=1)
    for row in scores:
        row[generator.integers(0, k + 1) :] = -np.inf
    positive = generator.integers(-4, 5, 7).astype(np.float32) / 4
    mask, dropped = choose(scores, positive, limits)
    expected = [chosen_slowly(row.tolist(), p, limits) for row, p in zip(scores, positive.tolist(), strict=True)]
    assert [np.flatnonzero(row).tolist() for row in mask] == [kept for kept, _ in expected]
    assert dropped == {reason: sum(d[reason] for _, d in expected) for reason in dropped}


@pytest.mark.parametrize(
    ("field", "limit", "positive", "kept"),
    [
        ("max_score", 0.5, 1.0, [0.5, 0.25, -0.75]),
        ("relative_margin", 0.5, 1.0, [0.5, 0.25, -0.75]),
        ("absolute_margin", 0.25, 0.75, [0.5, 0.25, -0.75]),
        # Below zero a share of the positive would lie above it; the limit is as far below it as above zero.
        ("relative_margin", 0.5, -0.5, [-0.75]),
    ],
)
def test_what_equals_a_limit_stays(field: str, limit: float, positive: float, kept: list[float]) -> None:
    base = {"count": 9, "skip": 0, "max_score": 1.0, "relative_margin": None}
    limits = Mine(model="m", **{**base, field: limit})
    scores = np.array([[0.75, 0.5, 0.25, -0.75]], np.float32)
    mask, _ = choose(scores, np.array([positive], np.float32), limits)
    assert scores[mask].tolist() == kept
