"""Failing queries against a search that looks at every passage."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_ray.engine.nearest import top_positions
from f2llm_ray.evaluate.failures import MOST, PER_LANGUAGE, find_failures
from f2llm_ray.evaluate.metrics.ranking import Judgements, K

LANGUAGES = ("deu", "fra", "jpn")


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=40)
def test_the_worst_of_each_language_are_told_with_the_rank_of_the_right_passage(seed: int, own: bool) -> None:
    rng = np.random.default_rng(seed)
    queries, passages = 30, 60
    vectors_ud = rng.standard_normal((queries + passages, 4)).astype(np.float32)
    vectors_ud /= np.linalg.norm(vectors_ud, axis=1, keepdims=True)
    query_q, corpus_c = np.arange(queries), rng.permutation(passages) + queries
    right_q = rng.integers(0, passages, queries)
    pairs = {(q, int(right_q[q])) for q in range(queries)} | {(q, int(rng.integers(passages))) for q in range(9)}
    relevant_r2 = np.array(sorted(pairs))
    own_q = np.array(
        [next(c for c in range(passages) if (q, c) not in pairs) if own else -1 for q in range(queries)]
    )
    judged = Judgements(relevant_r2, np.ones(len(relevant_r2)), own_q)
    languages = [LANGUAGES[q % 3] for q in range(queries)]
    top_qk = top_positions(vectors_ud, query_q, corpus_c, k=K, left_out_q=own_q)
    found = find_failures(vectors_ud, query_q, corpus_c, top_qk, judged, languages)
    assert found == find_failures(vectors_ud, query_q, corpus_c, top_qk, judged, languages)

    gaps: dict[int, tuple[float, int, int]] = {}
    for query in range(queries):
        score_c = vectors_ud[query_q[query]].astype(np.float64) @ vectors_ud[corpus_c].T.astype(np.float64)
        order = [c for c in np.argsort(-score_c).tolist() if c != own_q[query]]
        ranks = {c: order.index(c) + 1 for q, c in pairs if q == query}
        right = min(ranks, key=ranks.__getitem__)
        if ranks[right] > K:
            gaps[query] = float(score_c[order[0]] - score_c[right]), right, ranks[right]
    assert {failure.query for failure in found} <= set(gaps)
    for failure in found:
        assert (failure.right, failure.rank) == gaps[failure.query][1:]
        assert failure.found == top_qk[failure.query, 0]
    for language in LANGUAGES:
        of_it = sorted((q for q in gaps if languages[q] == language), key=lambda q: -gaps[q][0])
        assert [f.query for f in found if languages[f.query] == language] == of_it[:PER_LANGUAGE]


def test_a_model_that_finds_everything_has_no_failures_and_many_languages_share_the_places() -> None:
    count = MOST + 40
    vectors_ud = np.eye(2, dtype=np.float32)
    query_q, corpus_c = np.zeros(count, dtype=int), np.array([0] * K + [1])
    top_qk = top_positions(vectors_ud, query_q, corpus_c, k=K)
    everything = Judgements(np.array([[q, 0] for q in range(count)]), np.ones(count), np.full(count, -1))
    assert find_failures(vectors_ud, query_q, corpus_c, top_qk, everything, ["und"] * count) == []
    nothing = everything._replace(relevant_r2=np.array([[q, K] for q in range(count)]))
    names = [f"l{q // 2:03}" for q in range(count)]
    found = find_failures(vectors_ud, query_q, corpus_c, top_qk, nothing, names)
    assert len(found) == MOST
    assert {names[failure.query] for failure in found} == set(names), "each has its worst before any has a second"
    assert {failure.rank for failure in found} == {K + 1}
