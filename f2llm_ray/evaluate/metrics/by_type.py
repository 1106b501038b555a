"""Retrieval scores of shorter and smaller vectors: every trained dim as float, int8 and binary.

Passages are stored in the type. An int8 passage is compared with the query's float vector, as vector databases do;
with binary both are signs, ordered by Hamming distance.

Shapes: u distinct texts, d and k dims, q queries, n of them drawn, c passages, r relevant pairs, m of the drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from f2llm_ray.data.ragged import Ints
from f2llm_ray.evaluate.metrics.ranking import Judgements, K, metrics
from f2llm_ray.evaluate.vectors import evenly_drawn
from f2llm_ray.model.dims import Vectors, cut_dims, dequantize_int8, quantize_vectors

QUERIES = 1000
"""At most so many queries, evenly drawn: types are compared with each other on the same ones."""


def by_type(
    vectors_ud: Vectors,
    query_q: Ints,
    corpus_c: Ints,
    judged: Judgements,
    dims: Sequence[int],
    ranges: Mapping[int, Vectors],
    device: str,
) -> dict[str, dict[str, float]]:
    """nDCG@10 by dim and type.

    Args:
        vectors_ud: one unit vector per distinct text.
        query_q: which vector each query has.
        corpus_c: which vector each passage has.
        judged: what answers the queries.
        dims: the dims the model was trained for.
        ranges: [2, k] by dim k, for int8; a dim without is not measured as int8.
        device: where to compute.
    """
    from f2llm_ray.engine.nearest import top_positions

    drawn_n = evenly_drawn(len(query_q), QUERIES)
    kept_r = np.isin(judged.relevant_r2[:, 0], drawn_n)
    asked_m, passage_m = judged.relevant_r2[kept_r].T
    pairs_m2 = np.column_stack([np.searchsorted(drawn_n, asked_m), passage_m])
    grade_m, own_n, query_n = judged.grade_r[kept_r], judged.own_q[drawn_n], query_q[drawn_n]

    asked_n = np.arange(len(query_n))  # the queries' vectors come before the stored ones

    def score(asked_nk: Vectors, stored_uk: Vectors) -> float:
        both = np.concatenate([asked_nk, stored_uk])
        stored_c = corpus_c + len(asked_nk)
        top_nk = top_positions(both, asked_n, stored_c, k=K, left_out_q=own_n, device=device)
        found = metrics(top_nk, pairs_m2, len(corpus_c), grade_m)
        return round(float(found["ndcg@10"].mean()), 6)

    found = {}
    for dim in sorted(dims, reverse=True):
        cut_uk = cut_dims(vectors_ud, dim)
        scores = {"float": score(cut_uk[query_n], cut_uk)}
        if dim in ranges:
            codes_uk = quantize_vectors(cut_uk, "int8", ranges[dim])
            scores["int8"] = score(cut_uk[query_n], dequantize_int8(codes_uk, ranges[dim]))
        sign_uk = np.where(cut_uk > 0, np.float32(1), np.float32(-1))
        scores["binary"] = score(sign_uk[query_n], sign_uk)
        found[str(dim)] = scores
    return found
