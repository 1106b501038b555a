"""Exact search: the k best passages of each query by inner product, a block of scores at a time.

Shapes: q queries, c passages of the corpus, u and n distinct texts, k results per query, d dim; b and n a block's
queries and passages, m of its scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from f2llm_ray.data.ragged import Ints

if TYPE_CHECKING:
    import torch

    from f2llm_ray.model.dims import Vectors

# A block's scores and keys take about 16 bytes per entry. Measured on two cores: 1M entries at a time (16 MB)
# are faster than 4M, for which the memory must come fresh from the system each time.
BLOCK_ENTRIES = 1 << 20
BLOCK_QUERIES = 256

# A key holds a score above and a position below, so that the order of keys is the order of results.
POSITION_BITS = 32
POSITION_MASK = (1 << POSITION_BITS) - 1
NO_RESULT = -(1 << 63)


def top_positions(
    vectors_ud: Vectors,
    query_q: Ints,
    corpus_c: Ints,
    *,
    k: int,
    left_out_q: Ints | None = None,
    device: str = "cpu",
    block_entries: int = BLOCK_ENTRIES,
) -> Ints:
    """Corpus positions of the k best passages of each query by inner product, exactly, best first.

    Equal scores stand in the order of the corpus. Passages of the same text have the same vector, and are
    scored once and then set side by side, so that their tie does not hang on how a matrix product rounds
    in different columns.

    Args:
        vectors_ud: one vector per distinct text.
        query_q: which vector each query has.
        corpus_c: which vector each passage has.
        k: results per query.
        left_out_q: a corpus position that is no result of each query, -1 for none.
        device: where to compute.
        block_entries: scores held at a time.

    Returns:
        [q, min(k, c)]; -1 at the end of a row that has fewer.
    """
    import torch

    if left_out_q is not None and (left_out_q >= 0).any():
        one_more = top_positions(
            vectors_ud, query_q, corpus_c, k=k + 1, device=device, block_entries=block_entries
        )
        return _without(one_more, left_out_q)[:, :k]
    first_nk = _first_positions(corpus_c, k)
    distinct_n = corpus_c[first_nk[:, 0]]
    first = torch.from_numpy(first_nk).to(device)
    vectors = torch.from_numpy(vectors_ud).to(device)
    corpus_nd = vectors[torch.from_numpy(distinct_n).to(device)]
    queries = min(BLOCK_QUERIES, max(1, block_entries // k))
    passages = max(1, block_entries // queries)
    found = []
    for start in range(0, len(query_q), queries):
        query_bd = vectors[torch.from_numpy(query_q[start : start + queries]).to(device)]
        best_bk = torch.empty(len(query_bd), 0, dtype=torch.int64, device=device)
        for offset in range(0, len(corpus_nd), passages):
            score_bn = query_bd @ corpus_nd[offset : offset + passages].T
            best_bk = _best(torch.cat([best_bk, _better(score_bn, best_bk, offset, k)], dim=1), k)
        found.append(_spread(best_bk, first, min(k, len(corpus_c))).cpu().numpy())
    return np.concatenate(found)


def _without(top_qk: Ints, left_out_q: Ints) -> Ints:
    """The results without those that are left out; what comes after moves up, and -1 fills the rows."""
    out_qk = top_qk == left_out_q[:, None]
    order_qk = np.argsort(out_qk, axis=1, kind="stable")
    return np.take_along_axis(np.where(out_qk, -1, top_qk), order_qk, axis=1)


def _first_positions(corpus_c: Ints, k: int) -> Ints:
    """The first k places in the corpus of each distinct passage [n, k], -1 where it has fewer.

    The passages come in the order of their first place, so that ties between them are already in order.
    """
    order_c = np.argsort(corpus_c, kind="stable")
    _, start_n, count_n = np.unique(corpus_c[order_c], return_index=True, return_counts=True)
    within_c = np.arange(len(corpus_c)) - np.repeat(start_n, count_n)
    group_c = np.repeat(np.arange(len(start_n)), count_n)
    first_nk = np.full((len(start_n), k), -1, dtype=np.int64)
    kept = within_c < k
    first_nk[group_c[kept], within_c[kept]] = order_c[kept]
    first: Ints = first_nk[np.argsort(first_nk[:, 0])]
    return first


def _better(score_bn: torch.Tensor, best_bk: torch.Tensor, offset: int, k: int) -> torch.Tensor:
    """Keys [b, m] of the passages that may still come among the best, `NO_RESULT` filling the rows.

    Once a query has k results, only a score above its last one can: passages come in order, so a tie is lost.
    After a few blocks that is next to none, and comparing is cheaper than a key for every score.
    """
    import torch

    if best_bk.shape[1] < k:
        position_n = torch.arange(offset, offset + score_bn.shape[1], device=score_bn.device)
        return _best(_keys(score_bn, position_n), k)
    row_m, column_m = (score_bn > _scores(best_bk[:, -1:])).nonzero(as_tuple=True)
    count_b = torch.bincount(row_m, minlength=len(score_bn))
    within_m = torch.arange(len(row_m), device=row_m.device) - (count_b.cumsum(0) - count_b)[row_m]
    key_bm = torch.full((len(score_bn), int(count_b.max())), NO_RESULT, device=row_m.device)
    key_bm[row_m, within_m] = _keys(score_bn[row_m, column_m], offset + column_m)
    return key_bm


def _keys(score: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Scores and positions as integers whose descending order is by score, then by position.

    The bits of a float32 order like integers once the lower bits of negative numbers are flipped. The scores
    are overwritten.
    """
    import torch

    ordered = score.add_(0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered ^= (ordered >> 31).bitwise_and_(0x7FFFFFFF)
    key = ordered.long()
    key <<= POSITION_BITS
    key |= POSITION_MASK - position
    return key


def _scores(key: torch.Tensor) -> torch.Tensor:
    """The scores in keys."""
    import torch

    ordered = (key >> POSITION_BITS).int()
    return (ordered ^ (ordered >> 31).bitwise_and_(0x7FFFFFFF)).view(torch.float32)


def _best(key_bn: torch.Tensor, k: int) -> torch.Tensor:
    return key_bn.topk(min(k, key_bn.shape[1]), dim=1).values


def _spread(best_bk: torch.Tensor, first_nk: torch.Tensor, k: int) -> torch.Tensor:
    """Positions [b, k] in the corpus of results that are distinct passages, each set at all its places."""
    place_bkk = first_nk[POSITION_MASK - (best_bk & POSITION_MASK)]
    key_bkk = (best_bk & ~POSITION_MASK)[..., None] | (POSITION_MASK - place_bkk)
    key_bn = key_bkk.masked_fill(place_bkk < 0, NO_RESULT).flatten(1)
    return POSITION_MASK - (_best(key_bn, k) & POSITION_MASK)
