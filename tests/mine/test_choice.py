"""The nearest are those of a full sort, whatever the tiles; the choice is what its limits say, row by row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_ray.mine.settings import Mine
from f2llm_ray.mine.nearest import LOWEST, Nearest, choose, group_floor, pack, unpack
from f2llm_ray.mine.search import _near_enough, _take_out_cuda

Floats = np.ndarray[Any, np.dtype[np.float32]]


def by_full_sort(scores: Floats, k: int) -> list[list[tuple[float, int]]]:
    """The slow reference: every query's candidates sorted by falling score, then rising number."""
    lists = [sorted((-float(s), n) for n, s in enumerate(row) if s > -math.inf)[:k] for row in scores]
    return [[(-score, number) for score, number in row] for row in lists]


def pairs_of(nearest: Nearest) -> list[list[tuple[float, int]]]:
    scores, numbers = nearest.result()
    return [
        [(float(s), int(n)) for s, n in zip(*row, strict=True) if n >= 0]
        for row in zip(scores, numbers, strict=True)
    ]


def coarse_scores(generator: np.random.Generator, queries: int, passages: int) -> Floats:
    """Scores with many ties, both zeros, and some passages that are out."""
    scores = generator.integers(-4, 5, (queries, passages)).astype(np.float32) / 4
    scores[generator.random(scores.shape) < 0.1] = -0.0
    scores[generator.random(scores.shape) < 0.1] = -np.inf
    return scores


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 300), st.integers(1, 40), st.integers(1, 9))
def test_nearest_are_those_of_a_full_sort_in_any_tiles_and_order(
    seed: int, queries: int, passages: int, k: int, tiles: int
) -> None:
    generator = np.random.default_rng(seed)
    scores = coarse_scores(generator, queries, passages)
    expected = by_full_sort(scores, k)
    cuts = np.unique([0, *generator.integers(0, passages, tiles - 1), passages])
    order = generator.permutation(len(cuts) - 1)
    nearest, on_torch = Nearest(queries, k), Nearest(queries, k)
    for tile in order:
        first, last = int(cuts[tile]), int(cuts[tile + 1])
        nearest.offer(np.ascontiguousarray(scores[:, first:last]), first)
        rows, columns, found = _near_enough(torch.from_numpy(scores[:, first:last].copy()), on_torch.floor_q, k)
        on_torch.take(rows, columns + first, found)
    assert pairs_of(nearest) == expected
    assert pairs_of(on_torch) == expected  # what a GPU runs, on the CPU


def test_nearest_agree_with_float64_products_of_all_pairs() -> None:
    generator = np.random.default_rng(0)
    queries, passages = (generator.standard_normal((n, 48)).astype(np.float32) for n in (70, 1500))
    nearest = Nearest(70, 25)
    for first in range(0, 1500, 256):
        nearest.offer(queries @ passages[first : first + 256].T, first)
    exact = queries.astype(np.float64) @ passages.astype(np.float64).T
    assert (nearest.result()[1] == np.argsort(-exact, axis=1)[:, :25]).all()


def test_positives_are_taken_out_on_a_gpu_as_here() -> None:
    scores = torch.arange(12.0).reshape(3, 4)
    taken = _take_out_cuda(scores, np.array([0, 0, 2]), np.array([1, 3, 0]))
    assert taken.tolist() == [1, 3, 8]
    assert scores[[0, 0, 2], [1, 3, 0]].tolist() == [-math.inf] * 3
    assert scores.isinf().sum() == 3


def test_a_rising_order_that_floods_every_tile_is_still_exact() -> None:
    scores = np.sort(np.random.default_rng(1).standard_normal((5, 400)).astype(np.float32), axis=1)
    nearest = Nearest(5, 10)
    for first in range(0, 400, 50):
        nearest.offer(scores[:, first : first + 50].copy(), first)
    assert pairs_of(nearest) == by_full_sort(scores, 10)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 200), st.integers(1, 60))
def test_group_floor_is_reached_by_k_scores(seed: int, passages: int, k: int) -> None:
    scores = coarse_scores(np.random.default_rng(seed), 6, passages)
    floor = group_floor(scores, k)
    enough = (scores >= floor[:, None]).sum(axis=1) >= k
    assert (enough | (floor == LOWEST)).all()
    if passages < k:
        assert (floor == LOWEST).all()


def test_packed_candidates_sort_by_falling_score_then_rising_number_and_come_back() -> None:
    scores = np.array([-np.inf, LOWEST, -1.5, -1e-30, -0.0, 0.0, 1e-30, 0.5, 0.5, 1.0], np.float32)
    numbers = np.array([3, 1, 2**32 - 1, 0, 7, 8, 5, 9, 4, 6])
    order = np.argsort(pack(scores, numbers))[::-1]
    assert numbers[order].tolist() == [6, 4, 9, 5, 7, 8, 0, 2**32 - 1, 1, 3]
    back_scores, back_numbers = unpack(pack(scores, numbers))
    assert (back_scores == scores).all()
    assert (back_numbers == numbers).all()
    assert [part.tolist() for part in unpack(np.zeros(1, np.uint64))] == [[-math.inf], [-1]]


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
        elif (limits.relative_margin is not None and score > own - abs(own) * one(1 - limits.relative_margin)) or (
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
