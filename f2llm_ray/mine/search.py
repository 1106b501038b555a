"""The search for one shard of queries: block matrix products with all candidates, then the choice per row.

Memory: the queries' vectors, one shard of passage vectors and one tile of scores, whatever the source's size.
Shapes: q queries of a block, p candidates of a tile, d dims, k nearest, n rows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from f2llm_ray.data.ragged import Ints, list_array
from f2llm_ray.engine.vector_files import Halves, gather, shards_of
from f2llm_ray.mine.candidates import Candidates
from f2llm_ray.mine.nearest import DROPPED, LOWEST, Floats, Nearest, choose, group_size
from f2llm_ray.mine.settings import Mine
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    import torch

FOUND = pa.schema([("row", pa.int64()), ("candidates", pa.list_(pa.uint32()))])
BLOCK = 512
"""Queries per product."""
ROWS = 8192
"""Rows scored or chosen for at once."""


@dataclass(frozen=True)
class Layout:
    """How the work is cut. It is the same for any number of workers, so that every product has the same shape."""

    texts: int = 4096
    """Texts per shard of vectors."""
    queries: int = 4096
    """Queries per shard of the search."""


def search(
    found: Candidates, vectors: Folder, shard: int, settings: Mine, *, layout: Layout, device: str = "cpu"
) -> tuple[pa.Table, dict[str, int]]:
    """Mines for all rows of one shard of queries.

    Args:
        found: the source in numbers.
        vectors: its shards of vectors.
        shard: which queries.
        settings: how deep to look and what to keep.
        layout: how both were cut.
        device: where the products run.

    Returns:
        The rows as `FOUND`, each with up to `count` candidates, nearest first; and how many candidates among the
        nearest fell to each reason of `DROPPED`, over all rows. "positive" are those of the query, the row's own
        included, that are no farther than the last candidate that was looked at.
    """
    import torch

    first_query = shard * layout.queries
    query_qd = gather(vectors, found.queries[first_query : first_query + layout.queries], layout.texts)
    first_row, last_row = np.searchsorted(found.query, [first_query, first_query + len(query_qd)])
    query_n = found.query[first_row:last_row] - first_query
    own = _OwnScores(query_n, found.passage[first_row:last_row])
    blocks = [
        _Block(torch.from_numpy(query_qd[at : at + BLOCK]).to(device), first_query + at, settings.top_k)
        for at in range(0, len(query_qd), BLOCK)
    ]
    room = _Room(layout.texts, query_qd.shape[1], device)
    for first_text, vectors_td in shards_of(vectors, len(found.number), layout.texts):
        own.add(query_qd, vectors_td, first_text)
        first, last = np.searchsorted(found.candidates, [first_text, first_text + len(vectors_td)])
        if first < last:
            tile_pd = room.tile_pd[: last - first]
            tile_pd.copy_(torch.from_numpy(vectors_td[found.candidates[first:last] - first_text]))
            for block in blocks:
                block.offer(tile_pd, found, first, room.scores)
    scores_qk, numbers_qk = (
        np.concatenate(part) for part in zip(*(b.nearest.result() for b in blocks), strict=True)
    )
    positives_q = np.concatenate([block.near_positives() for block in blocks])
    dropped: Counter[str] = Counter(dict.fromkeys(DROPPED, 0))
    dropped["positive"] = int(positives_q[query_n].sum())
    chosen, lengths = [], []
    for at in range(0, len(query_n), ROWS):
        rows = query_n[at : at + ROWS]
        mask, reasons = choose(scores_qk[rows], own.scores[at : at + ROWS], settings)
        dropped.update(reasons)
        chosen.append(numbers_qk[rows][mask].astype(np.uint32))
        lengths.append(mask.sum(axis=1))
    lists = list_array(pa.array(np.concatenate(chosen)), np.concatenate(lengths))
    return pa.table([pa.array(found.row[first_row:last_row]), lists], schema=FOUND), dict(dropped)


class _Room:
    """Memory for one tile and its scores, allocated once: tiles differ in size, and freed ones leave holes.

    80,000 rows of 384 dims on one core: 361 MB at most, 270 of them the libraries; without it 532, and rising.
    """

    def __init__(self, texts: int, dim: int, device: str) -> None:
        import torch

        self.tile_pd = torch.empty(texts, dim, device=device)
        self.scores = torch.empty(BLOCK * texts, device=device)


class _OwnScores:
    """The score of each row's own passage, taken up when the shard with its vector comes by."""

    def __init__(self, query_n: Ints, passage_n: Ints) -> None:
        self.scores: Floats = np.empty(len(query_n), np.float32)
        self._query, self._passage = query_n, np.asarray(passage_n)
        self._order = np.argsort(self._passage, kind="stable")
        self._sorted = self._passage[self._order]

    def add(self, query_qd: Floats, vectors_td: Halves, first_text: int) -> None:
        first, last = np.searchsorted(self._sorted, [first_text, first_text + len(vectors_td)])
        for at in range(first, last, ROWS):
            rows = self._order[at : min(at + ROWS, last)]
            passages = vectors_td[self._passage[rows] - first_text].astype(np.float32)
            self.scores[rows] = np.einsum("nd,nd->n", query_qd[self._query[rows]], passages)


class _Block:
    """Some queries, their nearest candidates so far, and the positives that stood near enough to be one."""

    def __init__(self, query_qd: torch.Tensor, first_query: int, k: int) -> None:
        self.query_qd, self.first_query = query_qd, first_query
        self.nearest = Nearest(len(query_qd), k)
        self._positives: list[tuple[Ints, Floats]] = []

    def offer(self, tile_pd: torch.Tensor, found: Candidates, first: int, room: torch.Tensor) -> None:
        """Scores one tile; positives are out before the nearest are looked for.

        The product is torch's on either device: on one core (AVX-512), d 64 to 1024, it made 146 to 164 GFlop/s,
        numpy's 110 to 156.
        """
        import torch

        rows, columns = found.positive_cells(self.first_query, len(self.query_qd), first, first + len(tile_pd))
        shape = len(self.query_qd), len(tile_pd)
        scores_qp = torch.mm(self.query_qd, tile_pd.T, out=room[: shape[0] * shape[1]].view(shape))
        if scores_qp.is_cuda:
            positive = _take_out_cuda(scores_qp, rows, columns)
            near_rows, near_columns, scores = _near_enough(scores_qp, self.nearest.floor_q, self.nearest.k)
            self.nearest.take(near_rows, near_columns + first, scores)
        else:
            array_qp = scores_qp.numpy()
            positive = array_qp[rows, columns]
            array_qp[rows, columns] = -np.inf
            self.nearest.offer(array_qp, first)
        near = positive >= self.nearest.floor_q[rows]  # the floor only rises
        self._positives.append((rows[near], positive[near]))

    def near_positives(self) -> Ints:
        """Positives of each query [q] that reach the last of the nearest."""
        rows, scores = (np.concatenate(part) for part in zip(*self._positives, strict=True))
        return np.bincount(rows[scores >= self.nearest.floor_q[rows]], minlength=len(self.query_qd))


def _take_out_cuda(scores_qp: torch.Tensor, rows: Ints, columns: Ints) -> Floats:
    import torch

    cells = tuple(torch.from_numpy(part).to(scores_qp.device) for part in (rows, columns))
    taken: Any = scores_qp[cells].cpu().numpy()
    scores_qp[cells] = -np.inf
    return taken


def _near_enough(scores_qp: torch.Tensor, floor_q: Floats, k: int) -> tuple[Ints, Ints, Floats]:
    """What `Nearest.offer` takes of a tile, found where the scores are, so that only this much is moved.

    Returns:
        Row, column and score of each.
    """
    import torch

    queries, passages = scores_qp.shape
    floors = torch.from_numpy(floor_q).to(scores_qp.device)
    if passages >= k and (floor_q == LOWEST).any():
        groups = passages // group_size(passages, k)
        maxima = scores_qp[:, : passages // groups * groups].reshape(queries, -1, groups).amax(dim=1)
        floors = torch.maximum(floors, maxima.topk(k, dim=1, sorted=False).values.amin(dim=1))
    rows, columns = (scores_qp >= floors[:, None]).nonzero(as_tuple=True)
    parts: Any = (rows, columns, scores_qp[rows, columns])
    row, column, score = (part.cpu().numpy() for part in parts)
    return row, column, score
