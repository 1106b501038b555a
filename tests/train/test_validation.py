"""The held-out score is nDCG@10 as it is defined, over distinct texts."""

from __future__ import annotations

import numpy as np
import pytest

from f2llm_ray.train.validation import score


def slow(id_b2: np.ndarray, v_b2d: np.ndarray) -> float:
    """Query by query, over dictionaries."""
    pairs = [(int(q), int(p)) for q, p in id_b2 if q != p]
    vectors = dict(zip(id_b2.ravel().tolist(), v_b2d.reshape(-1, v_b2d.shape[-1]), strict=True))
    corpus = sorted({p for _, p in pairs})
    values = []
    for query in {q for q, _ in pairs}:
        relevant = {p for q, p in pairs if q == query}
        ranked = sorted(corpus, key=lambda p: -float(vectors[query] @ vectors[p]))[:10]
        gain = sum(1 / np.log2(place + 2) for place, p in enumerate(ranked) if p in relevant)
        values.append(gain / sum(1 / np.log2(place + 2) for place in range(min(len(relevant), 10))))
    return float(np.mean(values))


@pytest.mark.parametrize("seed", range(4))
def test_score_is_the_definition(seed: int) -> None:
    """Texts come again in several rows and as queries and passages both; some pairs ask nothing."""
    generator = np.random.default_rng(seed)
    id_b2 = generator.integers(0, 40, (60, 2))
    v_ud = generator.normal(size=(40, 8)).astype(np.float32)
    v_ud /= np.linalg.norm(v_ud, axis=1, keepdims=True)
    assert score(id_b2, v_ud[id_b2]) == pytest.approx(slow(id_b2, v_ud[id_b2]))
    order = generator.permutation(len(id_b2))
    assert score(id_b2[order], v_ud[id_b2[order]]) == pytest.approx(score(id_b2, v_ud[id_b2]))


def test_a_perfect_model_scores_one_and_nothing_to_ask_scores_nothing() -> None:
    ids = np.arange(20).reshape(-1, 2)
    v_b2d = np.repeat(np.eye(10, dtype=np.float32)[:, None], 2, axis=1)
    assert score(ids, v_b2d) == pytest.approx(1)
    assert score(np.array([[3, 3]]), np.ones((1, 2, 1), np.float32)) is None
