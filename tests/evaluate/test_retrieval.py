"""Metrics and exact search against slow references; shapes as in f2llm_ray.evaluate.metrics.ranking."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_ray.base.errors import RunError
from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.nearest import top_positions
from f2llm_ray.evaluate.metrics.ranking import METRICS, K, metrics
from f2llm_ray.evaluate.tasks.retrieval_set import RetrievalSet, from_pairs
from f2llm_ray.evaluate.vectors import Ints
from f2llm_ray.model.dims import cut_dims
from tests.tiny import LINES, tiny_model


def slow_top(query_qd: np.ndarray, corpus_cd: np.ndarray, k: int) -> list[list[int]]:
    """Every score by itself, sorted by score and then by position."""
    return [
        sorted(range(len(corpus_cd)), key=lambda c: (-float(query @ corpus_cd[c]), c))[:k] for query in query_qd
    ]


def slow_metrics(results: list[int], relevant: set[int]) -> dict[str, float]:
    """The definitions, one result at a time."""
    gain = sum(1 / math.log2(rank + 1) for rank, at in enumerate(results, start=1) if at in relevant)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(relevant), 10) + 1))
    return {
        "ndcg@10": gain / ideal,
        "acc@1": float(results[0] in relevant),
        "recall@10": len(relevant & set(results)) / len(relevant),
    }


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, Ints, Ints, list[set[int]]]:
    """Small whole numbers, so that scores are exact and ties are common; texts that repeat."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    texts, queries, passages = (draw(st.integers(1, top)) for top in (12, 6, 40))
    vectors_ud = rng.integers(-2, 3, (texts, 3)).astype(np.float32)
    query_q, corpus_c = rng.integers(0, texts, queries), rng.integers(0, texts, passages)
    relevant = [
        set(rng.choice(passages, rng.integers(1, passages + 1), replace=False).tolist()) for _ in range(queries)
    ]
    return vectors_ud, query_q, corpus_c, relevant


@given(problems(), st.sampled_from([1, 7, 16, 1 << 20]))
@settings(deadline=None, max_examples=150)
def test_search_and_metrics_equal_the_definitions_in_blocks_of_any_size(
    problem: tuple[np.ndarray, Ints, Ints, list[set[int]]], tile_scores: int
) -> None:
    vectors_ud, query_q, corpus_c, relevant = problem
    expected = slow_top(vectors_ud[query_q], vectors_ud[corpus_c], 10)
    top_qk = top_positions(vectors_ud, query_q, corpus_c, k=K, tile_scores=tile_scores)
    assert top_qk.tolist() == expected
    pairs_r2 = np.array([(q, c) for q, found in enumerate(relevant) for c in sorted(found)])
    values = metrics(top_qk, pairs_r2, len(corpus_c))
    for q, (results, found) in enumerate(zip(expected, relevant, strict=True)):
        assert {name: values[name][q] for name in METRICS} == pytest.approx(slow_metrics(results, found))


def test_blocked_search_equals_unblocked_on_real_numbers() -> None:
    rng = np.random.default_rng(0)
    vectors_ud = rng.standard_normal((1500, 16), dtype=np.float32)
    vectors_ud /= np.linalg.norm(vectors_ud, axis=1, keepdims=True)
    query_q, corpus_c = rng.integers(0, 1500, 200), rng.integers(0, 1500, 1000)
    whole = top_positions(vectors_ud, query_q, corpus_c, k=K)
    assert np.array_equal(whole, top_positions(vectors_ud, query_q, corpus_c, k=K, tile_scores=3000))


def test_what_is_left_out_makes_room_for_the_next() -> None:
    vectors_ud = np.array([[4.0], [3.0], [2.0], [1.0]], dtype=np.float32)
    query_q, corpus_c, left_out_q = np.zeros(3, dtype=int), np.arange(4), np.array([-1, 0, 2])
    top_qk = top_positions(vectors_ud, query_q, corpus_c, k=2, left_out_q=left_out_q)
    assert top_qk.tolist() == [[0, 1], [1, 2], [0, 1]]
    top_qk = top_positions(vectors_ud, query_q, corpus_c, k=K, left_out_q=left_out_q)
    assert top_qk.tolist() == [[0, 1, 2, 3], [1, 2, 3, -1], [0, 1, 3, -1]]
    values = metrics(top_qk, np.array([[0, 3], [1, 0], [2, 3]]), 4)
    assert values["recall@10"].tolist() == [1.0, 0.0, 1.0], "-1 is nobody's passage"


def test_values_worked_out_by_hand() -> None:
    top_qk = np.array([[4, 1, 0], [2, 3, 4]])
    relevant_r2 = np.array([[0, 0], [0, 1], [0, 2], [1, 2]])
    values = metrics(top_qk, relevant_r2, 5)
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert values["ndcg@10"] == pytest.approx([(1 / math.log2(3) + 1 / 2) / ideal, 1.0])
    assert values["acc@1"].tolist() == [0.0, 1.0]
    assert values["recall@10"] == pytest.approx([2 / 3, 1.0])


def test_more_relevant_passages_than_results_can_still_reach_ndcg_1() -> None:
    values = metrics(np.arange(10)[None], np.array([(0, c) for c in range(20)]), 20)
    assert values["ndcg@10"].tolist() == pytest.approx([1.0])
    assert values["recall@10"].tolist() == [0.5]


def test_truncation_makes_unit_vectors_again() -> None:
    vectors_nd = np.random.default_rng(0).standard_normal((50, 16), dtype=np.float32)
    cut_nd = cut_dims(vectors_nd, 4)
    assert cut_nd.shape == (50, 4)
    assert np.linalg.norm(cut_nd, axis=1) == pytest.approx(np.ones(50), abs=1e-6)
    assert cut_dims(np.zeros((1, 8), dtype=np.float32), 4).tolist() == [[0.0] * 4]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(tiny_model(tmp_path_factory.mktemp("model") / "tiny", hidden=32))


@pytest.fixture(scope="module")
def lines_set() -> RetrievalSet:
    """Each line is asked for by its first words."""
    rows = {
        "query": [line[:12] for line in LINES] * 2,
        "passage": [*LINES, *reversed(LINES)],
        "language": ["eng", "deu", "spa", "rus", "jpn", None] * 2,
    }
    return from_pairs(pa.table(rows), name="lines", instruction="Find the line.")


def test_evaluate_equals_the_slow_way(engine: Engine, lines_set: RetrievalSet) -> None:
    scores = lines_set.measure(engine, (1, 2, 4)).scores
    assert list(scores["scores"]) == ["32", "16", "8"]
    assert (scores["queries"], scores["corpus"]) == (6, 6)
    assert set(scores["languages"]["8"]) == {"eng", "deu", "spa", "rus", "jpn", "und"}
    for dim in (32, 16, 8):
        asked = [f"Instruct: Find the line.\nQuery: {text}" for text in lines_set.query_texts]
        query_qd, corpus_cd = engine.embed(asked, dim=dim), engine.embed(lines_set.corpus_texts, dim=dim)
        found = slow_top(query_qd, corpus_cd, 10)
        expected = [
            slow_metrics(results, {c for q, c in lines_set.relevant.tolist() if q == query})
            for query, results in enumerate(found)
        ]
        for metric in METRICS:
            mean = sum(values[metric] for values in expected) / len(expected)
            assert scores["scores"][str(dim)][metric] == pytest.approx(mean, abs=1e-5)
    texts = [*(f"Instruct: Find the line.\nQuery: {t}" for t in lines_set.query_texts), *LINES]
    assert scores["tokens"] == sum(map(len, engine.tokenize(texts)))


def test_vectors_that_are_not_numbers_are_an_error(
    engine: Engine, lines_set: RetrievalSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = np.full((12, 32), np.nan, dtype=np.float32)
    monkeypatch.setattr(engine, "embed_tokens", lambda tokens: nan[: len(tokens)])
    with pytest.raises(RunError, match="12 of 12 texts are not numbers"):
        lines_set.measure(engine, (1,))


def test_a_model_without_instructions_gets_the_bare_query(tmp_path: Path, lines_set: RetrievalSet) -> None:
    folder = tiny_model(tmp_path / "bare", hidden=32)
    info = folder / "f2llm.json"
    facts = {**json.loads(info.read_text()), "instructions": False, "prompts": {"query": ""}}
    info.write_text(json.dumps(facts))
    scores = lines_set.measure(bare := Engine(folder), (1,)).scores
    assert scores["tokens"] == sum(map(len, bare.tokenize([*lines_set.query_texts, *LINES])))
