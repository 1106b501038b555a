"""Metrics equal scikit-learn's and scipy's, on ties too; a unit that counts twice is two units."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from f2llm_ray.evaluate.metrics import weighted_metrics
from f2llm_ray.evaluate.metrics.intervals import Values
from f2llm_ray.evaluate.metrics.weighted_metrics import Builder

Reference = Callable[[Values, Values], float]


def accuracy_at_best(target: Values, value: Values) -> float:
    """Every threshold of scikit-learn's curve, the one above all values included."""
    false, true, _ = metrics.roc_curve(target, value, drop_intermediate=False)
    positive = target.sum()
    return float(((1 - false) * (len(target) - positive) + true * positive).max() / len(target))


def f1_at_best(target: Values, value: Values) -> float:
    precision, recall, _ = metrics.precision_recall_curve(target, value)
    return float((2 * precision * recall / np.maximum(precision + recall, 1e-300)).max())


def correlation(of: Callable[[Values, Values], tuple[float, float]]) -> Reference:
    """0 where either side is constant: scipy has no value there."""
    return lambda x, y: 0.0 if np.ptp(x) == 0 or np.ptp(y) == 0 else float(of(x, y)[0])


BINARY: dict[Builder, Reference] = {
    weighted_metrics.average_precision: lambda t, v: float(metrics.average_precision_score(t, v)),
    weighted_metrics.best_accuracy: accuracy_at_best,
    weighted_metrics.best_f1: f1_at_best,
}
GRADED: dict[Builder, Reference] = {
    weighted_metrics.mean: lambda _, v: float(v.mean()),
    weighted_metrics.pearson: correlation(stats.pearsonr),
    weighted_metrics.spearman: correlation(stats.spearmanr),
}
CLASSES: dict[Builder, Reference] = {
    weighted_metrics.macro_f1: lambda t, v: float(metrics.f1_score(t, v, average="macro")),
    weighted_metrics.v_measure: metrics.v_measure_score,
}


def columns(draw: st.DrawFn, top: int) -> tuple[Values, Values]:
    """Targets [n] and values [n, 2]: small whole numbers, which tie, or real numbers, which do not."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(2, 40))
    target_n = rng.integers(0, top, count).astype(np.float64)
    if draw(st.booleans()):
        return target_n, rng.integers(-2, top, (count, 2)).astype(np.float64)
    return target_n, rng.standard_normal((count, 2)) * [1.0, 1e-4] + [0, 0.9]


@st.composite
def graded(draw: st.DrawFn) -> tuple[Values, Values]:
    return columns(draw, 6)


@st.composite
def binary(draw: st.DrawFn) -> tuple[Values, Values]:
    target_n, value_nm = columns(draw, 2)
    target_n[0] = 1  # scikit-learn has no precision without one
    target_n[-1] = 0
    return target_n, value_nm


@st.composite
def classes(draw: st.DrawFn) -> tuple[Values, Values]:
    target_n, value_nm = columns(draw, 4)
    return target_n, np.clip(np.round(value_nm), 0, 5)


def check(problem: tuple[Values, Values], builder: Builder, reference: Reference, seed: int) -> None:
    target_n, value_nm = problem
    count = len(target_n)
    found_m = builder(target_n, value_nm)(np.ones((1, count)))[0]
    assert found_m == pytest.approx([reference(target_n, value_n) for value_n in value_nm.T], abs=1e-9)
    drawn_bn = np.random.default_rng(seed).integers(0, count, (3, count))
    drawn_bn[0] = np.random.default_rng(seed).integers(0, count)  # a resample may be one unit many times
    drawn_bn[1:, :2] = [0, count - 1]  # the others have both classes
    weight_bn = np.stack([np.bincount(drawn_n, minlength=count) for drawn_n in drawn_bn]).astype(np.float64)
    found_bm = builder(target_n, value_nm)(weight_bn)
    assert np.isfinite(found_bm).all()
    for drawn_n, found_m in zip(drawn_bn[1:], found_bm[1:], strict=True):
        expected = [reference(target_n[drawn_n], value_n[drawn_n]) for value_n in value_nm.T]
        assert found_m == pytest.approx(expected, abs=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("builder", "reference"), GRADED.items(), ids=lambda item: getattr(item, "__name__", ""))
@given(graded(), st.integers(0, 2**32))
@settings(max_examples=60)
def test_graded(builder: Builder, reference: Reference, problem: tuple[Values, Values], seed: int) -> None:
    check(problem, builder, reference, seed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("builder", "reference"), BINARY.items(), ids=lambda item: getattr(item, "__name__", ""))
@given(binary(), st.integers(0, 2**32))
@settings(max_examples=60)
def test_binary(builder: Builder, reference: Reference, problem: tuple[Values, Values], seed: int) -> None:
    check(problem, builder, reference, seed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("builder", "reference"), CLASSES.items(), ids=lambda item: getattr(item, "__name__", ""))
@given(classes(), st.integers(0, 2**32))
@settings(max_examples=60)
def test_classes(builder: Builder, reference: Reference, problem: tuple[Values, Values], seed: int) -> None:
    check(problem, builder, reference, seed)


def test_a_model_that_gives_every_pair_the_same_cosine_orders_nothing() -> None:
    target_n, value_n1 = np.arange(50.0), np.full((50, 1), 0.3)
    for builder in (weighted_metrics.spearman, weighted_metrics.pearson):
        assert builder(target_n, value_n1)(np.ones((1, 50))).tolist() == [[0.0]]
