"""Exact search: the k best passages of each query by inner product, a tile of scores at a time.

Evaluation searches a corpus in memory (`top_positions`); mining streams a corpus from disk and offers its tiles to
`Nearest` itself. Ties go to the lower position, whatever the tiles and their order.

Shapes: q queries, c passages of the corpus, u distinct texts, n distinct passages, k results per query, d dim;
b queries and p passages of one tile, m of its scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from f2llm_ray.data.ragged import Ints, numbered

if TYPE_CHECKING:
    from f2llm_ray.model.dims import Vectors

# Measured on two cores: tiles of 1M scores (4 MB) are faster than of 4M, for which the memory must come fresh from
# the system each time.
TILE_SCORES = 1 << 20
BLOCK_QUERIES = 256

# A key holds a score above and a position below, so that the order of keys is the order of results.
POSITION_BITS = 32
POSITION_MASK = (1 << POSITION_BITS) - 1
NO_RESULT = -(1 << 63)
LOWEST = float(np.finfo(np.float32).min)


class Nearest:
    """The k best passages of each query among all that were offered, in whatever tiles and order they came."""

    def __init__(self, queries: int, k: int, device: str | torch.device = "cpu") -> None:
        self.k = k
        self.key_qk = torch.full((queries, k), NO_RESULT, device=device)
        """Best first."""
        self.floor_q = torch.full((queries,), LOWEST, device=device)
        """Only a score at or above it can still come in; it only rises."""

    def offer(self, score_qp: torch.Tensor, first: int) -> None:
        """Takes what is good enough of one tile.

        After the first tiles few scores reach the floor, and a tile costs one comparison per score. -inf and NaN
        never become results. `first` is the position of the tile's first passage; no passage may come twice.
        """
        floor_q = self.floor_q
        if bool((floor_q == LOWEST).any()):
            floor_q = torch.maximum(floor_q, group_floor(score_qp, self.k))
        cell_m = _reaching(score_qp, floor_q)
        if not len(cell_m):
            return
        queries, passages = score_qp.shape
        row_q = torch.arange(queries + 1, device=cell_m.device)
        start_q = torch.searchsorted(cell_m, row_q * passages)  # and the end of the last
        row_q, start_q, count_q = row_q[:-1], start_q[:-1], start_q.diff()
        widest = int(count_q.max())
        column_m = cell_m - (row_q * passages).repeat_interleave(count_q, output_size=len(cell_m))
        place_m = (row_q * widest - start_q).repeat_interleave(count_q, output_size=len(cell_m))
        place_m += torch.arange(len(cell_m), device=cell_m.device)
        new_qm = torch.full((queries, widest), NO_RESULT, device=cell_m.device)
        new_qm.view(-1)[place_m] = pack(score_qp.reshape(-1)[cell_m], column_m + first)
        self.key_qk = _largest(torch.cat([self.key_qk, new_qm], dim=1), self.k)
        self.floor_q = unpack(self.key_qk[:, -1])[0].clamp_(min=LOWEST)


def pack(score: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Scores (float32, none NaN) and positions (below 2^32) as int64 keys: the larger, the better.

    The bits of a float32 order like integers once the lower bits of negative numbers are flipped.
    """
    bits = (score + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into the 0.0 that it equals
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    return bits.long().bitwise_left_shift_(POSITION_BITS).bitwise_or_(POSITION_MASK - position)


def unpack(key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores and positions in keys; -inf and -1 for `NO_RESULT`."""
    ordered = (key >> POSITION_BITS).int()
    score = (ordered ^ (ordered >> 31).bitwise_and_(0x7FFFFFFF)).view(torch.float32)
    none = key == NO_RESULT
    return score.masked_fill_(none, -np.inf), (POSITION_MASK - (key & POSITION_MASK)).masked_fill_(none, -1)


def group_floor(score_qp: torch.Tensor, k: int) -> torch.Tensor:
    """A score [q] that at least k of each query's scores reach, found without ordering all of them.

    The scores fall into 2k groups or more; the k-th largest of the groups' maxima is reached by k groups, so by k
    scores, and by few more. Numbers of groups that are multiples of 64 suit vector registers: on one core 0.2 ns a
    score with 64 groups of 2,048 scores, 3 ns with 20; np.partition of all scores takes 1.6, torch.topk 21.

    Returns:
        The bounds; the lowest float32 where there are fewer than k passages.
    """
    queries, passages = score_qp.shape
    if passages < k:
        return torch.full((queries,), LOWEST, device=score_qp.device)
    groups = min(passages, -(-2 * k // 64) * 64)
    maxima = score_qp[:, : passages // groups * groups].reshape(queries, -1, groups).amax(dim=1)
    return torch.nan_to_num(_largest(maxima, k)[:, -1], nan=LOWEST, neginf=LOWEST)


def _on_cpu(value: torch.Tensor) -> bool:
    return value.device.type == "cpu"


def _reaching(score_qp: torch.Tensor, floor_q: torch.Tensor) -> torch.Tensor:
    """Places [m], counted along the rows, of the scores that reach their query's floor.

    On a CPU by numpy: 512 x 4096 scores took 3.3 ms there on one core, 6.0 ms in torch.
    """
    if not _on_cpu(score_qp):
        return (score_qp >= floor_q[:, None]).view(-1).nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(score_qp.numpy() >= floor_q.numpy()[:, None]))


def _largest(value_qm: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row, falling.

    On a CPU by numpy: of 512 x 250 keys the best 100 took 0.4 ms there on one core, 1.4 ms in torch.
    """
    if not _on_cpu(value_qm):
        return value_qm.topk(k, dim=1).values
    return torch.from_numpy(np.sort(value_qm.numpy(), axis=1)[:, : -k - 1 : -1].copy())


def top_positions(
    vectors_ud: Vectors,
    query_q: Ints,
    corpus_c: Ints,
    *,
    k: int,
    left_out_q: Ints | None = None,
    device: str = "cpu",
    tile_scores: int = TILE_SCORES,
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
        tile_scores: scores held at a time.

    Returns:
        [q, min(k, c)]; -1 at the end of a row that has fewer.
    """
    if left_out_q is not None and (left_out_q >= 0).any():
        one_more = top_positions(vectors_ud, query_q, corpus_c, k=k + 1, device=device, tile_scores=tile_scores)
        return _without(one_more, left_out_q)[:, :k]
    first_nk = _first_positions(corpus_c, k)
    vectors = torch.from_numpy(vectors_ud).to(device)
    corpus_nd = vectors[torch.from_numpy(corpus_c[first_nk[:, 0]]).to(device)]
    first = torch.from_numpy(first_nk).to(device)
    queries = min(BLOCK_QUERIES, max(1, tile_scores // k))
    passages = max(1, tile_scores // queries)
    found = []
    for start in range(0, len(query_q), queries):
        query_bd = vectors[torch.from_numpy(query_q[start : start + queries]).to(device)]
        nearest = Nearest(len(query_bd), k, device)
        for offset in range(0, len(corpus_nd), passages):
            nearest.offer(query_bd @ corpus_nd[offset : offset + passages].T, offset)
        found.append(_spread(nearest.key_qk, first, min(k, len(corpus_c))).cpu().numpy())
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
    within_c = numbered(count_n)
    group_c = np.repeat(np.arange(len(start_n)), count_n)
    first_nk = np.full((len(start_n), k), -1, dtype=np.int64)
    kept = within_c < k
    first_nk[group_c[kept], within_c[kept]] = order_c[kept]
    first: Ints = first_nk[np.argsort(first_nk[:, 0])]
    return first


def _spread(key_bk: torch.Tensor, first_nk: torch.Tensor, k: int) -> torch.Tensor:
    """Positions [b, k] in the corpus of results that are distinct passages, each set at all its places."""
    _, passage_bk = unpack(key_bk)
    place_bkk = first_nk[passage_bk]  # any of them where there is no result
    none = (place_bkk < 0) | (passage_bk < 0)[..., None]
    key_bkk = ((key_bk & ~POSITION_MASK)[..., None] | (POSITION_MASK - place_bkk)).masked_fill_(none, NO_RESULT)
    return unpack(_largest(key_bkk.flatten(1), k))[1]
