"""How good the 10 best results are: the share of the relevant passages among them, and their ranks.

Shapes: q queries, k results per query, r relevant pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from f2llm_ray.data.ragged import Ints
from f2llm_ray.evaluate.metrics.intervals import Values

K = 10
METRICS = ("ndcg@10", "acc@1", "recall@10")


class Judgements(NamedTuple):
    """Which passages answer the queries of a set."""

    relevant_r2: Ints
    """The relevant (query, passage) pairs, sorted and distinct; every query has one."""
    grade_r: Values
    """How relevant each is [r], above 0."""
    own_q: Ints
    """The passage that is the query itself, and so is left out of its results [q]; -1 where there is none."""


def metrics(top_qk: Ints, relevant_r2: Ints, corpus: int, grade_r: Values | None = None) -> dict[str, Values]:
    """The metrics of each query.

    ndcg@10 is the sum of grade / log2(rank + 1) over relevant results, divided by the same sum with the most
    relevant passages on top (as trec_eval has it); acc@1 is whether the first result is relevant; recall@10 is
    the share of the query's relevant passages that is among the results.

    Args:
        top_qk: corpus positions of each query's results, best first; at most `K`, -1 where there are fewer.
        relevant_r2: the relevant (query, passage) pairs, sorted and distinct; every query has one.
        corpus: number of passages.
        grade_r: how relevant each is; all alike when left out.

    Returns:
        By metric: [q].
    """
    query_r, passage_r = relevant_r2.T
    grade_r = np.ones(len(relevant_r2)) if grade_r is None else grade_r
    pair_r, pair_qk = query_r * corpus + passage_r, np.arange(len(top_qk))[:, None] * corpus + top_qk
    place_qk = np.minimum(np.searchsorted(pair_r, pair_qk), len(pair_r) - 1)
    hit_qk = (pair_r[place_qk] == pair_qk) & (top_qk >= 0)
    gain_qk = np.where(hit_qk, grade_r[place_qk], 0)
    relevant_q = np.bincount(query_r, minlength=len(top_qk))
    discount_k = 1 / np.log2(np.arange(2, top_qk.shape[1] + 2))
    return {
        "ndcg@10": gain_qk @ discount_k / _ideal(query_r, grade_r, relevant_q),
        "acc@1": hit_qk[:, 0].astype(np.float64),
        "recall@10": hit_qk.sum(axis=1) / relevant_q,
    }


def chance(judged: Judgements, corpus: int) -> Values:
    """ndcg@10 of each query [q] that passages in random order have on average.

    Each rank then has a passage's mean gain: the sum of the query's grades over the passages that can be results.
    """
    query_r = judged.relevant_r2[:, 0]
    queries = len(judged.own_q)
    candidates_q = corpus - (judged.own_q >= 0)
    total_q = np.bincount(query_r, judged.grade_r, minlength=queries)
    discount_k = 1 / np.log2(np.arange(2, K + 2))
    # Fewer candidates than ranks: those that are left have no result.
    reached_q = np.append(0, np.cumsum(discount_k))[np.minimum(candidates_q, K)]
    ideal_q = _ideal(query_r, judged.grade_r, np.bincount(query_r, minlength=queries))
    return total_q / candidates_q * reached_q / ideal_q


def _ideal(query_r: Ints, grade_r: Values, relevant_q: Ints) -> Values:
    """The sum of grade / log2(rank + 1) with the most relevant passages on top [q]."""
    # The grades of each query from its highest on, and the rank of each there.
    best_r = np.lexsort((-grade_r, query_r))
    rank_r = np.arange(len(query_r)) - np.repeat(np.cumsum(relevant_q) - relevant_q, relevant_q) + 1
    ideal_r = np.where(rank_r <= K, grade_r[best_r] / np.log2(rank_r + 1), 0)
    return np.asarray(np.bincount(query_r, ideal_r, minlength=len(relevant_q)), dtype=np.float64)
