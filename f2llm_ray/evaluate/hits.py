"""How good the best 10 results are: what share of the relevant passages they hold, and how high those stand.

Shapes: q queries, k results per query, r relevant pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from f2llm_ray.evaluate.intervals import Values

if TYPE_CHECKING:
    from f2llm_ray.evaluate.encode import Positions
    from f2llm_ray.evaluate.sets import Pairs

K = 10
METRICS = ("ndcg@10", "acc@1", "recall@10")


def metrics(top_qk: Positions, relevant_r2: Pairs, corpus: int) -> dict[str, Values]:
    """The metrics of each query, relevance being yes or no.

    ndcg@10 is the sum of 1 / log2(rank + 1) over relevant results, divided by the same sum with all the
    relevant passages on top; acc@1 is whether the first result is relevant; recall@10 is the share of the
    query's relevant passages that is among the results.

    Args:
        top_qk: corpus positions of each query's results, best first; at most `K`.
        relevant_r2: the relevant (query, passage) pairs, distinct; every query has one.
        corpus: number of passages.

    Returns:
        By metric: [q].
    """
    query_q1 = np.arange(len(top_qk))[:, None]
    hit_qk = np.isin(query_q1 * corpus + top_qk, relevant_r2[:, 0] * corpus + relevant_r2[:, 1])
    relevant_q = np.bincount(relevant_r2[:, 0], minlength=len(top_qk))
    gain_k = 1 / np.log2(np.arange(2, K + 2))
    ideal_q = np.cumsum(gain_k)[np.minimum(relevant_q, K) - 1]
    return {
        "ndcg@10": hit_qk @ gain_k[: hit_qk.shape[1]] / ideal_q,
        "acc@1": hit_qk[:, 0].astype(np.float64),
        "recall@10": hit_qk.sum(axis=1) / relevant_q,
    }
