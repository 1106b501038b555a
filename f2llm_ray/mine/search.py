"""The search for one shard of queries: block matrix products with all candidates, then the choice per row.

Memory: the queries' vectors, one shard of passage vectors and one tile of scores, whatever the source's size.
Shapes: q queries of a block, p candidates of a tile, t texts of a shard, d dims, k nearest, n rows, m positives of
the block among the tile's candidates.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from f2llm_ray.data.ragged import Ints, list_array
from f2llm_ray.engine.nearest import Nearest, unpack
from f2llm_ray.engine.vector_files import Halves, gather, shards_of
from f2llm_ray.mine.candidates import Candidates
from f2llm_ray.mine.settings import Mine
from f2llm_ray.model.dims import Vectors
from f2llm_ray.run.folder import Folder

Mask = np.ndarray[Any, np.dtype[np.bool_]]

FOUND = pa.schema([("row", pa.int64()), ("candidates", pa.list_(pa.uint32()))])
BLOCK = 1024
"""Queries per product."""
ROWS = 8192
"""Rows scored or chosen for at once."""
DROPPED = ("positive", "skip", "max_score", "margin")
"""Why a passage among the nearest is no negative of a row."""


@dataclass(frozen=True)
class Layout:
    """How the work is cut. It is the same for any number of workers, so that every product has the same shape."""

    texts: int = 4096
    """Texts per shard of vectors."""
    queries: int = 4096
    """Queries per shard of the search."""
    rescored: int = 256
    """Queries per part of the rescoring, which takes much longer; a shard of the search is a number of parts."""


@dataclass(frozen=True)
class Near:
    """What was found for some queries that follow each other."""

    score_qk: Vectors
    """Of the nearest candidates that are no positives, falling; -inf where there were fewer than k."""
    number_qk: Ints
    """Which candidates these are; -1 where there were fewer."""
    own_n: Vectors
    """Score of each row's own passage."""
    positives_q: Ints
    """Positives of each query that are no farther than the last of the nearest."""


def search(
    found: Candidates, vectors: Folder, shard: int, settings: Mine, *, layout: Layout, device: str = "cpu"
) -> tuple[pa.Table, dict[str, int]]:
    """Mines for all rows of one shard of a source's queries, by its shards of vectors.

    Returns:
        What `choose_of_rows` returns.
    """
    near = find_near(found, vectors, shard, settings.top_k, layout=layout, device=device)
    return choose_of_rows(found, shard * layout.queries, near, settings)


def find_near(
    found: Candidates, vectors: Folder, shard: int, top_k: int, *, layout: Layout, device: str = "cpu"
) -> Near:
    """The nearest candidates of each query of one shard."""
    first_query = shard * layout.queries
    query_qd = gather(vectors, found.queries[first_query : first_query + layout.queries], layout.texts)
    rows = found.rows_of(first_query, len(query_qd))
    own = _OwnScores(found.query[rows] - first_query, found.passage[rows])
    blocks = [
        _Block(torch.from_numpy(query_qd[at : at + BLOCK]).to(device), first_query + at, top_k)
        for at in range(0, len(query_qd), BLOCK)
    ]
    # Room for one tile and its scores, allocated once: tiles differ in size, and freed ones leave holes. 80,000
    # rows of 384 dims on one core: 406 MB at most, 270 of them the libraries.
    tile_room = torch.empty(layout.texts, query_qd.shape[1], device=device)
    score_room = torch.empty(BLOCK * layout.texts, device=device)
    for first_text, vectors_td in shards_of(vectors, len(found.number), layout.texts):
        own.add(query_qd, vectors_td, first_text)
        first, last = np.searchsorted(found.candidates, [first_text, first_text + len(vectors_td)])
        if first < last:
            tile_pd = tile_room[: last - first]
            tile_pd.copy_(torch.from_numpy(vectors_td[found.candidates[first:last] - first_text]))
            for block in blocks:
                block.offer(tile_pd, found, first, score_room)
    score_qk, number_qk = (part.cpu().numpy() for part in unpack(torch.cat([b.nearest.key_qk for b in blocks])))
    positives_q = np.concatenate([block.near_positives() for block in blocks])
    return Near(score_qk, number_qk, own.scores, positives_q)


def choose_of_rows(
    found: Candidates, first_query: int, near: Near, settings: Mine
) -> tuple[pa.Table, dict[str, int]]:
    """Chooses the negatives of all rows of some queries.

    Returns:
        The rows as `FOUND`, each with up to `count` candidates, nearest first; and how many candidates among the
        nearest fell to each reason of `DROPPED`, over all rows. "positive" are those of the query, the row's own
        included, that are no farther than the last candidate that was looked at.
    """
    of_rows = found.rows_of(first_query, len(near.score_qk))
    query_n = found.query[of_rows] - first_query
    dropped: Counter[str] = Counter(dict.fromkeys(DROPPED, 0))
    dropped["positive"] = int(near.positives_q[query_n].sum())
    chosen, lengths = [], []
    for at in range(0, len(query_n), ROWS):
        rows = query_n[at : at + ROWS]
        mask, reasons = choose(near.score_qk[rows], near.own_n[at : at + ROWS], settings)
        dropped.update(reasons)
        chosen.append(near.number_qk[rows][mask].astype(np.uint32))
        lengths.append(mask.sum(axis=1))
    lists = list_array(pa.array(np.concatenate(chosen)), np.concatenate(lengths))
    return pa.table([pa.array(found.row[of_rows]), lists], schema=FOUND), dict(dropped)


def found_name(shard: int) -> str:
    """File of what was found for a shard of queries."""
    return f"{shard:06d}.parquet"


def write_found(folder: Folder, shard: int, rows: pa.Table, dropped: dict[str, int]) -> None:
    """Writes what `choose_of_rows` returned; the counts travel in the file, as several runs may write shards."""
    folder.write_table(found_name(shard), [rows], FOUND.with_metadata({"dropped": json.dumps(dropped)}))


class _OwnScores:
    """The score of each row's own passage, taken up when the shard with its vector comes by."""

    def __init__(self, query_n: Ints, passage_n: Ints) -> None:
        self.scores: Vectors = np.empty(len(query_n), np.float32)
        self._query, self._passage = query_n, np.asarray(passage_n)
        self._order = np.argsort(self._passage, kind="stable")
        self._sorted = self._passage[self._order]

    def add(self, query_qd: Vectors, vectors_td: Halves, first_text: int) -> None:
        first, last = np.searchsorted(self._sorted, [first_text, first_text + len(vectors_td)])
        for at in range(first, last, ROWS):
            rows = self._order[at : min(at + ROWS, last)]
            passages = vectors_td[self._passage[rows] - first_text].astype(np.float32)
            self.scores[rows] = np.einsum("nd,nd->n", query_qd[self._query[rows]], passages)


class _Block:
    """Some queries, their nearest candidates so far, and the positives that stood near enough to be one."""

    def __init__(self, query_qd: torch.Tensor, first_query: int, k: int) -> None:
        self.query_qd, self.first_query = query_qd, first_query
        self.nearest = Nearest(len(query_qd), k, query_qd.device)
        self._positives: list[tuple[torch.Tensor, torch.Tensor]] = []

    def offer(self, tile_pd: torch.Tensor, found: Candidates, first: int, room: torch.Tensor) -> None:
        """Scores one tile; positives are out before the nearest are looked for.

        The product is torch's on either device: on one core (AVX-512), d 64 to 1024, it made 146 to 164 GFlop/s,
        numpy's 110 to 156.
        """
        cells = found.positive_cells(self.first_query, len(self.query_qd), first, first + len(tile_pd))
        row_m, column_m = (torch.from_numpy(part).to(room.device) for part in cells)
        shape = len(self.query_qd), len(tile_pd)
        score_qp = torch.mm(self.query_qd, tile_pd.T, out=room[: shape[0] * shape[1]].view(shape))
        score_m = take_out(score_qp, row_m, column_m)
        self.nearest.offer(score_qp, first)
        near = score_m >= self.nearest.floor_q[row_m]  # the floor only rises
        self._positives.append((row_m[near], score_m[near]))

    def near_positives(self) -> Ints:
        """Positives of each query [q] that reach the last of the nearest."""
        row_m, score_m = (torch.cat(part) for part in zip(*self._positives, strict=True))
        near_m = row_m[score_m >= self.nearest.floor_q[row_m]]
        return torch.bincount(near_m, minlength=len(self.query_qd)).cpu().numpy()


def take_out(score_qp: torch.Tensor, row_m: torch.Tensor, column_m: torch.Tensor) -> torch.Tensor:
    """The scores [m] of some cells, which become -inf, the score of no result."""
    taken_m = score_qp[row_m, column_m]
    score_qp[row_m, column_m] = -np.inf
    return taken_m


def choose(score_nk: Vectors, positive_n: Vectors, settings: Mine) -> tuple[Mask, dict[str, int]]:
    """Which of the nearest passages are a row's negatives.

    Of the k nearest the first `skip` go, whatever their score; then those above a limit; of what is left the
    first `count` stay. The limits are those of sentence-transformers' `mine_hard_negatives`, in float32, and what
    equals a limit stays: a score s is kept where s <= max_score, s <= p - |p| * relative_margin and
    s + absolute_margin <= p, with p the score of the row's own passage. The relative limit is
    p * (1 - relative_margin) for every p >= 0; below 0 that product would allow passages nearer than the positive.
    One thing is different: their `range_min` skips after the limits, our `skip` before, as the ranks in the mined
    data of the paper's predecessor are counted.

    Args:
        score_nk: of the nearest passages that are no positives, falling; -inf where there were fewer than k.
        positive_n: score of each row's own passage.
        settings: `skip`, `count` and the limits.

    Returns:
        A mask [n, k], and how many fell to `skip`, `max_score` and `margin`, each by the first that applies.
    """
    left = score_nk > -np.inf
    dropped: dict[str, int] = {}

    def drop(reason: str, out: Mask) -> None:
        dropped[reason] = dropped.get(reason, 0) + int((left & out).sum())
        left[out] = False

    drop("skip", np.broadcast_to(np.arange(score_nk.shape[1]) < settings.skip, score_nk.shape))
    drop("max_score", score_nk > np.float32(settings.max_score))
    dropped["margin"] = 0
    if settings.relative_margin is not None:
        limit_n = positive_n - np.abs(positive_n) * np.float32(settings.relative_margin)
        drop("margin", score_nk > limit_n[:, None])
    if settings.absolute_margin is not None:
        drop("margin", score_nk + np.float32(settings.absolute_margin) > positive_n[:, None])
    return left & (np.cumsum(left, axis=1) <= settings.count), dropped
