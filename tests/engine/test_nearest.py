"""The best passages are those of a full sort, whatever the tiles, their order and the device."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_ray.engine.nearest import LOWEST, NO_RESULT, Nearest, group_floor, pack, top_positions, unpack
from f2llm_ray.model.dims import Vectors


def by_full_sort(scores: Vectors, k: int) -> list[list[tuple[float, int]]]:
    """The slow reference: every query's candidates sorted by falling score, then rising number."""
    lists = [sorted((-float(s), n) for n, s in enumerate(row) if s > -math.inf)[:k] for row in scores]
    return [[(-score, number) for score, number in row] for row in lists]


def pairs_of(nearest: Nearest) -> list[list[tuple[float, int]]]:
    scores, numbers = (part.numpy() for part in unpack(nearest.key_qk))
    return [
        [(float(s), int(n)) for s, n in zip(*row, strict=True) if n >= 0]
        for row in zip(scores, numbers, strict=True)
    ]


def coarse_scores(generator: np.random.Generator, queries: int, passages: int) -> Vectors:
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
    for on_cpu in (True, False):  # the other is what a GPU runs, on the CPU
        nearest = Nearest(queries, k)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("f2llm_ray.engine.nearest._on_cpu", lambda _, here=on_cpu: here)
            for tile in order:
                first, last = int(cuts[tile]), int(cuts[tile + 1])
                nearest.offer(torch.from_numpy(scores[:, first:last].copy()), first)
        assert pairs_of(nearest) == expected


def test_nearest_agree_with_float64_products_of_all_pairs() -> None:
    generator = np.random.default_rng(0)
    queries, passages = (generator.standard_normal((n, 48)).astype(np.float32) for n in (70, 1500))
    nearest = Nearest(70, 25)
    for first in range(0, 1500, 256):
        nearest.offer(torch.from_numpy(queries @ passages[first : first + 256].T), first)
    exact = queries.astype(np.float64) @ passages.astype(np.float64).T
    assert (unpack(nearest.key_qk)[1].numpy() == np.argsort(-exact, axis=1)[:, :25]).all()


def test_a_rising_order_that_floods_every_tile_is_still_exact() -> None:
    scores = np.sort(np.random.default_rng(1).standard_normal((5, 400)).astype(np.float32), axis=1)
    nearest = Nearest(5, 10)
    for first in range(0, 400, 50):
        nearest.offer(torch.from_numpy(scores[:, first : first + 50].copy()), first)
    assert pairs_of(nearest) == by_full_sort(scores, 10)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 200), st.integers(1, 60))
def test_group_floor_is_reached_by_k_scores(seed: int, passages: int, k: int) -> None:
    scores = coarse_scores(np.random.default_rng(seed), 6, passages)
    floor = group_floor(torch.from_numpy(scores), k).numpy()
    enough = (scores >= floor[:, None]).sum(axis=1) >= k
    assert (enough | (floor == LOWEST)).all()
    if passages < k:
        assert (floor == LOWEST).all()


def test_packed_scores_sort_by_falling_score_then_rising_position_and_come_back() -> None:
    scores = torch.tensor([-np.inf, LOWEST, -1.5, -1e-30, -0.0, 0.0, 1e-30, 0.5, 0.5, 1.0])
    positions = torch.tensor([3, 1, 2**32 - 1, 0, 7, 8, 5, 9, 4, 6])
    order = pack(scores, positions).argsort(descending=True)
    assert positions[order].tolist() == [6, 4, 9, 5, 7, 8, 0, 2**32 - 1, 1, 3]
    back_scores, back_positions = unpack(pack(scores, positions))
    assert torch.equal(back_scores, scores)
    assert torch.equal(back_positions, positions)
    assert [part.tolist() for part in unpack(torch.tensor([NO_RESULT]))] == [[-math.inf], [-1]]


def test_a_score_that_is_nan_is_no_result() -> None:
    vectors = np.array([[1.0], [np.nan], [3.0]], np.float32)
    top = top_positions(vectors, np.array([0, 1]), np.arange(3), k=3)
    assert top.tolist() == [[2, 0, -1], [-1, -1, -1]]
