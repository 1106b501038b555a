"""Bootstrap intervals against the theory of the mean, and the laws of comparing two models."""

from __future__ import annotations

import time

import numpy as np
import pytest

from f2llm_ray.evaluate.metrics.intervals import bootstrap, interval, mean_of
from tests.evaluate.paired import paired_bootstrap


def test_every_resample_draws_as_many_units_as_there_are() -> None:
    counts: list[np.ndarray] = []
    bootstrap(lambda weight_bn: [counts.append(weight_bn), weight_bn[:, :1]][1], 700, "s", resamples=3000)
    drawn = np.concatenate(counts)
    assert len(counts) > 1, "the blocks are part of the test"
    assert drawn.shape == (3000, 700)
    assert (drawn.sum(axis=1) == 700).all()
    assert (drawn == drawn.round()).all()
    # Binomial(700, 1/700) for every unit: mean 1, variance 0.9986; four standard errors.
    assert drawn.mean(axis=0) == pytest.approx(np.ones(700), abs=4 * 3000**-0.5)
    assert drawn.var() == pytest.approx(1, abs=0.01)


def test_the_interval_is_that_of_the_mean_and_of_every_dim() -> None:
    values_nm = np.random.default_rng(0).random((4000, 3)) * [1, 2, 4]
    sample_rm = bootstrap(mean_of(values_nm), 4000, 7)
    assert sample_rm.shape == (1000, 3)
    for m in range(3):
        low, high = interval(sample_rm[:, m])
        error = values_nm[:, m].std() / 4000**0.5
        assert low == pytest.approx(values_nm[:, m].mean() - 1.96 * error, abs=0.35 * error)
        assert high == pytest.approx(values_nm[:, m].mean() + 1.96 * error, abs=0.35 * error)
    assert np.array_equal(sample_rm, bootstrap(mean_of(values_nm), 4000, 7)), "the seed decides"
    assert not np.array_equal(sample_rm, bootstrap(mean_of(values_nm), 4000, 8))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draws = np.random.default_rng(3).exponential(size=(300, 120))
    held = 0
    for seed, values_n in enumerate(draws):
        low, high = interval(bootstrap(mean_of(values_n[:, None]), 120, seed)[:, 0])
        held += low <= 1 <= high
    # 95 % of 300 are 285 +- 4; the percentile interval of a skewed mean holds a little less.
    assert 270 <= held <= 297


def test_equal_models_differ_by_nothing_and_order_turns_the_sign() -> None:
    rng = np.random.default_rng(0)
    a_q = rng.random(500)
    same = paired_bootstrap(a_q, a_q.copy(), 1)
    assert same == (0.0, 0.0, 0.0, 1.0)
    b_q = a_q - 0.02 * rng.random(500)
    ahead, behind = paired_bootstrap(a_q, b_q, 1), paired_bootstrap(b_q, a_q, 1)
    assert ahead.difference == pytest.approx(a_q.mean() - b_q.mean()) == -behind.difference
    assert 0 < ahead.low < ahead.difference < ahead.high
    assert (ahead.low, ahead.high) == pytest.approx((-behind.high, -behind.low))
    assert ahead.p == behind.p == pytest.approx(2 / 1001), "a difference seen in every resample"


def test_pairs_are_compared_query_by_query() -> None:
    """Queries of very unequal difficulty: unpaired, half a point would drown."""
    rng = np.random.default_rng(0)
    a_q = rng.random(300)
    found = paired_bootstrap(a_q, a_q - rng.normal(0.005, 0.01, 300), 5)
    assert found.high - found.low < 0.004
    assert found.p < 0.01


def test_without_a_difference_few_are_called_significant() -> None:
    rng = np.random.default_rng(1)
    p = [paired_bootstrap(*rng.normal(size=(2, 80)), seed).p for seed in range(300)]
    assert 4 <= sum(value < 0.05 for value in p) <= 30
    assert 0.35 < float(np.mean(p)) < 0.65


def test_what_cannot_be_paired_is_refused() -> None:
    for a_q, b_q in ((np.ones(3), np.ones(4)), (np.ones(0), np.ones(0))):
        with pytest.raises(ValueError, match="values against"):
            paired_bootstrap(a_q, b_q, 0)


def test_ten_thousand_queries_take_well_below_a_second() -> None:
    values_nm = np.random.default_rng(0).random((10_000, 4))
    started = time.process_time()
    bootstrap(mean_of(values_nm), 10_000, 0)
    assert time.process_time() - started < 1, "0.13 s on one quiet core"
