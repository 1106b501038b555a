"""Shorter and smaller vectors against slow references: float, dequantized int8, and Hamming distance."""

from __future__ import annotations

import numpy as np
import pytest

from f2llm_ray.evaluate.metrics.by_type import QUERIES, by_type
from f2llm_ray.evaluate.metrics.ranking import Judgements, metrics
from f2llm_ray.model.dims import cut_dims, dequantize_int8, quantize_vectors

DIMS = (8, 12, 32)


def ranked(score_qc: np.ndarray) -> np.ndarray:
    return np.argsort(-score_qc, axis=1, kind="stable")[:, :10]


@pytest.mark.parametrize("queries", [40, QUERIES + 7])
def test_each_type_is_its_slow_reference(queries: int) -> None:
    draw = np.random.default_rng(0)
    corpus = 60
    vectors = draw.standard_normal((queries + corpus, 32)).astype(np.float32)
    vectors[:queries] += vectors[queries + np.arange(queries) % corpus]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    relevant = np.column_stack([np.arange(queries), np.arange(queries) % corpus])
    ranges = {dim: np.stack([(cut := cut_dims(vectors, dim)).min(0), cut.max(0)]) for dim in DIMS if dim != 12}
    grades = draw.integers(1, 4, queries).astype(float)
    own = np.where(np.arange(queries) % 3 == 0, (np.arange(queries) + 1) % corpus, -1)
    judged = Judgements(relevant, grades, own)
    found = by_type(vectors, np.arange(queries), np.arange(queries, queries + corpus), judged, DIMS, ranges, "cpu")

    count = min(queries, QUERIES)
    drawn = np.unique(np.linspace(0, queries - 1, count).round().astype(int))
    assert len(drawn) == count
    pairs = np.column_stack([np.arange(count), relevant[drawn, 1]])
    assert list(found) == ["32", "12", "8"]
    for dim in DIMS:
        cut = cut_dims(vectors, dim)
        asked, stored = cut[drawn].astype(np.float64), cut[queries:]
        signs_q, signs_c = cut[drawn] > 0, stored > 0
        slow = {"float": asked @ stored.T.astype(np.float64)}
        if dim != 12:
            codes = quantize_vectors(stored, "int8", ranges[dim])
            decoded = dequantize_int8(codes, ranges[dim])
            assert np.abs(decoded - stored).max() <= (ranges[dim][1] - ranges[dim][0]).max() / 255
            slow["int8"] = asked @ decoded.T.astype(np.float64)
        slow["binary"] = -(signs_q[:, None, :] != signs_c[None]).sum(axis=2)
        assert set(found[str(dim)]) == set(slow)
        for kind, score in slow.items():
            without = score.astype(np.float64)
            without[own[drawn] >= 0, own[drawn][own[drawn] >= 0]] = -np.inf
            wanted = metrics(ranked(without), pairs, corpus, grades[drawn])["ndcg@10"].mean()
            assert found[str(dim)][kind] == pytest.approx(wanted, abs=2e-6), (dim, kind)
