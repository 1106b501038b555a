"""Queries that a model fails on: none of their right passages is among the results.

Shapes: u distinct texts, d dim, q queries, c passages, k results per query, r relevant pairs, n failures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from f2llm_ray.data.ragged import Ints
from f2llm_ray.evaluate.metrics.ranking import Judgements, K
from f2llm_ray.evaluate.vectors import cosines
from f2llm_ray.model.dims import Vectors

PER_LANGUAGE, MOST = 3, 200
"""Failures that are told of a language, and of all of them."""
AT_ONCE = 16
"""Queries whose scores of all texts are in memory."""


class Failure(NamedTuple):
    """A query and positions in the corpus."""

    query: int
    right: int
    """The right passage that is nearest to the query."""
    found: int
    """The first result."""
    rank: int
    """Of the right passage, from 1."""


def find_failures(
    vectors_ud: Vectors,
    query_q: Ints,
    corpus_c: Ints,
    top_qk: Ints,
    judged: Judgements,
    languages: Sequence[str],
) -> list[Failure]:
    """The worst failures of each language, `PER_LANGUAGE` at most, `MOST` in all.

    The worst have the largest gap between the cosine of the first result and that of the right passage; equal ones
    stand in the order of the queries.

    Args:
        vectors_ud: one unit vector per distinct text.
        query_q: which vector each query has.
        corpus_c: which vector each passage has.
        top_qk: the results, best first, -1 for none.
        judged: what answers the queries.
        languages: of the queries.
    """
    query_r, passage_r = judged.relevant_r2.T
    hit_r = (top_qk[query_r] == passage_r[:, None]).any(axis=1)
    failed_q = (np.bincount(query_r, hit_r, minlength=len(top_qk)) == 0) & (top_qk[:, 0] >= 0)
    kept_r = failed_q[query_r]
    query_r, passage_r = query_r[kept_r], passage_r[kept_r]
    cosine_r = cosines(vectors_ud, query_q[query_r], corpus_c[passage_r]) if len(query_r) else np.empty(0)
    # Of each query its nearest right passage: pairs are sorted by query, the nearest comes first.
    order_r = np.lexsort((passage_r, -cosine_r, query_r))
    first_n = order_r[np.unique(query_r[order_r], return_index=True)[1]]
    query_n, right_n = query_r[first_n], passage_r[first_n]
    found_n = top_qk[query_n, 0]
    if not len(query_n):
        return []
    gap_n = cosines(vectors_ud, query_q[query_n], corpus_c[found_n]) - cosine_r[first_n]
    told, turns = Counter[str](), []
    for place in np.lexsort((query_n, -gap_n.round(6))).tolist():
        language = languages[query_n[place]]
        told[language] += 1
        if told[language] <= PER_LANGUAGE:
            turns.append((told[language], language, place))
    # Each language has its worst before any has its second worst.
    chosen = sorted(turns, key=lambda entry: entry[0])[:MOST]
    some = np.array([place for _, _, place in sorted(chosen, key=lambda entry: (entry[1], entry[0]))])
    rank_n = _ranks(vectors_ud, query_q, corpus_c, query_n[some], right_n[some], judged.own_q)
    columns = (query_n[some], right_n[some], found_n[some], rank_n)
    return [Failure(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _ranks(vectors_ud: Vectors, query_q: Ints, corpus_c: Ints, asked_n: Ints, right_n: Ints, own_q: Ints) -> Ints:
    """The rank of a passage for each query; equal cosines stand in the order of the corpus."""
    found = []
    for start in range(0, len(asked_n), AT_ONCE):
        asked_b, right_b = asked_n[start : start + AT_ONCE], right_n[start : start + AT_ONCE]
        score_bu = vectors_ud[query_q[asked_b]] @ vectors_ud.T
        for score_u, asked, right in zip(score_bu, asked_b.tolist(), right_b.tolist(), strict=True):
            score_c = score_u[corpus_c]
            before_c = score_c > score_c[right]
            before_c[:right] |= score_c[:right] == score_c[right]
            if own_q[asked] >= 0:
                before_c[own_q[asked]] = False
            found.append(int(before_c.sum()) + 1)
    # The search sums in another order, and by it none is among the first K.
    return np.maximum(np.array(found, dtype=np.int64), K + 1)
