"""Scores by language, over all and macro, with their intervals; comparisons of two models."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from f2llm_ray.evaluate.differences import compare
from f2llm_ray.evaluate.measure import clean_scores
from f2llm_ray.evaluate.metrics import weighted_metrics
from f2llm_ray.evaluate.metrics.intervals import bootstrap, interval, mean_of
from f2llm_ray.evaluate.metrics.scores import Measured, measured, units_table
from f2llm_ray.evaluate.tasks.registry import TASKS, main_metric
from tests.evaluate.paired import paired_bootstrap


def measure(kind: str, units: pa.Table, value_nm: np.ndarray) -> Measured:
    metrics = {"main": main_metric(kind), "other": weighted_metrics.mean}
    values = {2 ** (5 - m): {"main": value_n, "other": 1 - value_n} for m, value_n in enumerate(value_nm.T)}
    return measured(kind, metrics, units, values, corpus=7, tokens=9)


def named(languages: list[str]) -> pa.Table:
    return units_table([str(n) for n in range(len(languages))], languages)


@given(st.lists(st.tuples(st.sampled_from(["eng", "deu", "und"]), st.floats(0, 1)), min_size=1, max_size=30))
def test_languages_weigh_to_the_mean_of_all_and_count_once_in_macro(rows: list[tuple[str, float]]) -> None:
    value_n = np.array([value for _, value in rows])
    scores = measure("retrieval", named([language for language, _ in rows]), value_n[:, None]).scores
    languages, overall = scores["languages"]["32"], scores["scores"]["32"]
    assert list(languages) == sorted({language for language, _ in rows})
    assert sum(found["queries"] for found in languages.values()) == scores["queries"] == len(rows)
    assert overall["main"] == pytest.approx(value_n.mean(), abs=1e-6)
    assert overall["other"] == pytest.approx(1 - value_n.mean(), abs=1e-6)
    assert overall["macro"] == pytest.approx(np.mean([found["main"] for found in languages.values()]), abs=1e-6)
    for found in [overall, *languages.values()]:
        assert value_n.min() - 1e-6 <= found["ci"][0] <= found["ci"][1] <= value_n.max() + 1e-6
    assert (scores["metric"], scores["corpus"], scores["tokens"]) == ("main", 7, 9)


def test_one_language_is_the_plain_bootstrap_and_two_are_drawn_apart() -> None:
    value_nm = np.random.default_rng(0).random((500, 2)) * [0.1, 0.2]
    one = measure("retrieval", named(["und"] * 500), value_nm).scores["scores"]
    for m, dim in enumerate(("32", "16")):
        expected = interval(bootstrap(mean_of(value_nm), 500, "und")[:, m])
        assert one[dim]["ci"] == one[dim]["macro_ci"] == pytest.approx(expected, abs=1e-6)
    # Two languages that lie far apart: how far is no reason for doubt, since each has its own sample.
    languages = ["deu"] * 400 + ["eng"] * 100
    shifted = measure("retrieval", named(languages), value_nm + np.repeat([0.0, 0.8], [400, 100])[:, None]).scores
    low, high = shifted["scores"]["32"]["ci"]
    assert high - low == pytest.approx(one["32"]["ci"][1] - one["32"]["ci"][0], rel=0.15)
    low, high = shifted["scores"]["32"]["macro_ci"]
    error = 0.1 / 12**0.5 * (1 / 400 + 1 / 100) ** 0.5 / 2
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15), "the rarer language decides"


def test_correlations_are_taken_within_a_language() -> None:
    """In each language the model orders all pairs right; one language has the higher cosines throughout."""
    grades = np.tile(np.arange(20.0), 2)
    cosines = np.concatenate([np.linspace(0.8, 0.9, 20), np.linspace(0.1, 0.2, 20)])
    units = units_table([str(n) for n in range(40)], ["deu"] * 20 + ["eng"] * 20, grades)
    found = measure("sts", units, cosines[:, None])
    assert found.scores["scores"]["32"]["main"] == 1.0
    assert stats.spearmanr(grades, cosines)[0] < 0.6
    assert found.units.column_names == ["id", "language", "target", "32"]
    assert found.units["target"].to_pylist() == grades.tolist()
    assert found.units["32"].to_pylist() == cosines.tolist()


def test_a_comparison_is_the_paired_bootstrap_of_what_was_kept() -> None:
    rng = np.random.default_rng(0)
    value_nm = rng.random((300, 2))
    units = named(["eng"] * 300)
    a, b = measure("retrieval", units, value_nm), measure("retrieval", units, value_nm * 0.9)
    found = compare("retrieval", a.units, b.units, (32, 16))
    expected = paired_bootstrap(value_nm[:, 0], value_nm[:, 1] * 0.9, "eng")
    assert found.all == pytest.approx(expected)
    assert found.macro == pytest.approx(expected)
    assert found.languages["eng"] == pytest.approx(expected)


def test_a_comparison_of_clusterings_tells_the_better_one() -> None:
    rng = np.random.default_rng(0)
    label_n = rng.integers(0, 4, 400).astype(np.float64)
    spoiled_n = np.where(rng.random(400) < 0.3, rng.integers(0, 4, 400), label_n)
    units = units_table([str(n) for n in range(400)], ["deu", "eng"] * 200, label_n)
    a, b = (measure("clustering", units, value_n[:, None]) for value_n in (label_n, spoiled_n))
    found = compare("clustering", a.units, b.units, (32, 32))
    worse = [
        weighted_metrics.v_measure(label_n[half::2], spoiled_n[half::2, None])(np.ones((1, 200)))[0, 0]
        for half in (0, 1)
    ]
    assert found.all.difference == pytest.approx(1 - np.mean(worse))
    assert 0 < found.all.low < found.all.difference < found.all.high
    assert {language: each.p < 0.01 for language, each in found.languages.items()} == {"deu": True, "eng": True}
    same = compare("clustering", b.units, b.units, (32, 32))
    assert same.all == same.macro == (0.0, 0.0, 0.0, 1.0)


def test_other_units_cannot_be_compared() -> None:
    value_nm = np.ones((3, 1))
    a = measure("retrieval", named(["eng"] * 3), value_nm)
    b = measure("retrieval", units_table(["0", "1", "x"], ["eng"] * 3), value_nm)
    with pytest.raises(ValueError, match="3 units against 3, and they are not the same"):
        compare("retrieval", a.units, b.units, (32, 32))


@pytest.mark.parametrize("kind", TASKS)
def test_clean_scores_are_those_of_the_units_that_were_not_trained_on(kind: str) -> None:
    rng = np.random.default_rng(0)
    target_n = None if main_metric(kind) is weighted_metrics.mean else rng.integers(0, 2, 200).astype(np.float64)
    value_nm = rng.integers(0, 5, (200, 2)).astype(np.float64)
    languages = rng.choice(["deu", "eng", "und"], 200).tolist()
    contaminated_n = rng.random(200) < 0.4
    contaminated_n[[language == "und" for language in languages]] = True
    (kept_k,) = np.nonzero(~contaminated_n)
    whole = measure(kind, units_table([str(n) for n in range(200)], languages, target_n), value_nm)
    part = units_table(
        [str(n) for n in kept_k], [languages[n] for n in kept_k], None if target_n is None else target_n[kept_k]
    )
    expected = measure(kind, part, value_nm[kept_k]).scores["scores"]
    found = clean_scores(kind, whole.units, contaminated_n)
    assert found == {dim: scores["main"] for dim, scores in expected.items()}
    assert found != {dim: scores["main"] for dim, scores in whole.scores["scores"].items()}
    none = clean_scores(kind, whole.units, np.zeros(200, dtype=bool))
    assert none == {dim: scores["main"] for dim, scores in whole.scores["scores"].items()}
    assert clean_scores(kind, whole.units, np.ones(200, dtype=bool)) == {}
