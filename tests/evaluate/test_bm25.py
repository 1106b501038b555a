"""BM25 against its formula, one word at a time in float64, and what it counts as a word."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_ray.evaluate.bm25 import K1, MANY, B, index_cost, top_passages, words
from f2llm_ray.evaluate.metrics.ranking import Judgements, K, chance, metrics
from f2llm_ray.evaluate.metrics.scores import NO_DIM
from f2llm_ray.evaluate.tasks.retrieval_set import RetrievalSet, from_pairs

TEXTS = st.lists(st.sampled_from("abcdefgh"), max_size=12).map(" ".join)


def slow_scores(query: list[str], passages: list[list[str]]) -> list[float]:
    """Lucene's BM25 of each passage, as it is written down; a word that the query has twice counts twice."""
    mean = sum(map(len, passages)) / len(passages)
    scores = []
    for passage in passages:
        score = 0.0
        for word in query:
            having = sum(word in other for other in passages)
            idf = math.log(1 + (len(passages) - having + 0.5) / (having + 0.5))
            often = passage.count(word)
            score += idf * often / (often + K1 * (1 - B + B * len(passage) / mean)) if often else 0.0
        scores.append(score)
    return scores


@given(st.lists(TEXTS, min_size=1, max_size=5), st.lists(TEXTS, min_size=1, max_size=15), st.integers(1, 12))
@settings(max_examples=100)
def test_results_are_those_of_the_formula(queries: list[str], passages: list[str], k: int) -> None:
    top_qk = top_passages(queries, passages, k=k)
    assert top_qk.shape == (len(queries), k)
    for query, row in zip(queries, top_qk.tolist(), strict=True):
        score_c = slow_scores(words(query), [words(text) for text in passages]) if any(passages) else []
        expected = sorted((score for score in score_c if score > 0), reverse=True)[:k]
        found = [at for at in row if at >= 0]
        assert row == found + [-1] * (k - len(found))
        assert len(set(found)) == len(found)
        assert [score_c[at] for at in found] == pytest.approx(expected, rel=1e-5)
        same = [(passages[a], a) for a in found]
        assert all(a < b for (text, a), (other, b) in itertools.pairwise(same) if text == other), "ties in order"


def test_the_query_itself_is_left_out() -> None:
    passages, left_out_q = ["a b", "a", "c"], np.array([1, -1])
    assert top_passages(["a", "a"], passages, k=2, left_out_q=left_out_q).tolist() == [[0, -1], [1, 0]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World! foo_bar 3.5", ["hello", "world", "foo", "bar", "3", "5"]),
        ("Straße ﬁne ＡＢ", ["strasse", "fine", "ab"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("cafe\u0301", ["café"]),
        ("日本語", ["日本", "本語"]),
        ("猫が、眠る。", ["猫が", "眠る"]),
        ("ไทย", ["ไท", "ทย"]),
        ("한국어를 배", ["한국", "국어", "어를", "배"]),
        ("a日b本語", ["a", "日", "b", "本語"]),
        ("?!… _", []),
    ],
)
def test_words_and_pairs_of_characters(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_text_without_spaces_is_found() -> None:
    passages = ["猫が窓のそばで眠っています。", "犬が庭で走っています。", "ไม่มีช่องว่างระหว่างคำ"]
    assert top_passages(["眠る猫が", "庭の犬が", "ช่องว่าง"], passages, k=1).tolist() == [[0], [1], [2]]


def test_passages_without_words_are_no_results() -> None:
    assert top_passages(["a", ""], ["", "…"], k=2).tolist() == [[-1, -1], [-1, -1]]


def test_the_cost_is_told_of_large_sets() -> None:
    assert index_cost(MANY - 1, 10**12) is None
    told = index_cost(MANY, 50 * MANY)
    assert told == f"{MANY:,} passages takes about 59.0 MB of memory and 3.4 s of one core"


@pytest.fixture
def pairs() -> RetrievalSet:
    rows = [
        (
            " ".join(f"w{(n * step) % 40}" for step in range(1, 5)),
            " ".join(f"w{(n + step) % 40}" for step in (1, 3, 7)),
        )
        for n in range(60)
    ]
    queries, passages = zip(*rows, strict=True)
    table = {"query": queries, "passage": passages, "language": [("deu", "fra", "jpn")[n % 3] for n in range(60)]}
    return from_pairs(pa.table(table), name="pairs", instruction="Find it.")


def test_bm25_is_scored_as_a_model_is_and_by_language(pairs: RetrievalSet) -> None:
    found = pairs.measure_bm25()
    assert found.scores["kind"] == "retrieval"
    assert found.scores["types"] == {}
    top_qk = top_passages(pairs.query_texts, pairs.corpus_texts, k=K)
    expected = metrics(top_qk, pairs.relevant, len(pairs.corpus_ids))
    overall, by_language = found.scores["scores"][str(NO_DIM)], found.scores["languages"][str(NO_DIM)]
    assert found.units[str(NO_DIM)].to_pylist() == pytest.approx(expected["ndcg@10"].tolist())
    for metric, value_q in expected.items():
        assert overall[metric] == pytest.approx(value_q.mean(), abs=1e-6)
        for language, facts in by_language.items():
            own_q = np.array([language == other for other in pairs.query_languages])
            assert facts[metric] == pytest.approx(value_q[own_q].mean(), abs=1e-6)
            assert facts["queries"] == own_q.sum()
    low, high = overall["ci"]
    assert low <= overall["ndcg@10"] <= high
    assert pairs.measure_bm25().scores == found.scores


@pytest.mark.parametrize(("corpus", "own"), [(5, -1), (6, 5), (14, -1), (14, 13)])
def test_chance_is_the_mean_over_orders(corpus: int, own: int) -> None:
    relevant_r2, grade_r = np.array([[0, 0], [0, 2], [0, 3]]), np.array([1.0, 3.0, 0.5])
    judged = Judgements(relevant_r2, grade_r, np.array([own]))
    others = [at for at in range(corpus) if at != own]
    if corpus < 10:
        orders = list(itertools.permutations(others))
    else:
        orders = [np.random.default_rng(seed).permutation(others).tolist() for seed in range(20_000)]
    scores = [metrics(np.array([order[:K]]), relevant_r2, corpus, grade_r)["ndcg@10"][0] for order in orders]
    assert chance(judged, corpus)[0] == pytest.approx(np.mean(scores), abs=1e-9 if corpus < 10 else 0.01)
