"""Rescoring: the nearest candidates of each query, scored again by another model before any is left out.

Shapes: q queries that follow each other, k nearest, m pairs.
"""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa

from f2llm_ray.data.flow import Item
from f2llm_ray.data.ragged import lengths_of, list_array, numbered
from f2llm_ray.engine.cross_encoder import CROSS_ENCODER
from f2llm_ray.mine.candidates import Candidates
from f2llm_ray.mine.scorers import PairScorer, Rescorer, Scorer, VectorScorer
from f2llm_ray.mine.search import Layout, Near, choose_of_rows, found_name, write_found
from f2llm_ray.mine.settings import Mine
from f2llm_ray.run.folder import Folder

NEAR = pa.schema([("positives", pa.int64()), ("candidates", pa.list_(pa.uint32()))])
"""The nearest candidates of each query, as they wait for their scores."""


def near_table(near: Near) -> pa.Table:
    """What was found for some queries, as `NEAR`: their scores are not needed any more."""
    there = near.number_qk >= 0
    lists = list_array(pa.array(near.number_qk[there].astype(np.uint32)), there.sum(axis=1))
    return pa.table([pa.array(near.positives_q), lists], schema=NEAR)


def rescore(
    source: str, found: Candidates, near: pa.Table, first_query: int, score: Scorer, settings: Mine
) -> tuple[pa.Table, dict[str, int]]:
    """Scores what was found for some queries again, and their rows' own passages, and chooses by these scores.

    Candidates of equal scores come in the order of their keys.

    Args:
        source: its name.
        found: its numbers.
        near: of the queries, as `NEAR`.
        first_query: the first of them.
        score: the scorer.
        settings: of mining.

    Returns:
        What `choose_of_rows` returns.
    """
    lists = near["candidates"].combine_chunks()
    lengths, number = lengths_of(lists), lists.flatten().to_numpy().astype(np.int64)
    rows = found.rows_of(first_query, len(near))
    query_m = np.concatenate([np.repeat(np.arange(len(near)), lengths) + first_query, found.query[rows]])
    text_m = np.concatenate([np.asarray(found.candidates)[number], found.passage[rows]])
    score_m = score(source, found, query_m, text_m)
    shape = len(near), int(lengths.max(initial=1))
    score_qk, number_qk = np.full(shape, -np.inf, np.float32), np.full(shape, -1)
    cells = np.repeat(np.arange(len(near)), lengths), numbered(lengths)
    score_qk[cells], number_qk[cells] = score_m[: len(number)], number
    order = np.lexsort((number_qk, -score_qk))
    score_qk, number_qk = (np.take_along_axis(part, order, axis=1) for part in (score_qk, number_qk))
    positives = near["positives"].to_numpy()
    return choose_of_rows(
        found, first_query, Near(score_qk, number_qk, score_m[len(number) :], positives), settings
    )


class RescorePart:
    """Rescores parts of a source's queries and writes what was chosen; made once per actor."""

    def __init__(
        self, rescorer: Rescorer, store: Folder, out: Folder, layout: Layout, settings: Mine, threads: int
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        self.score: Scorer
        if rescorer.kind == CROSS_ENCODER:
            self.score = PairScorer(rescorer.model, store)
        else:
            self.score = VectorScorer(out, layout)
        self.out, self.layout, self.settings = out, layout, settings

    def __call__(self, item: Item) -> Item:
        """Rescores one part of a shard of queries."""
        started = time.perf_counter()
        name, first = item["source"], item["shard"] * self.layout.rescored
        shard, within = divmod(first, self.layout.queries)
        near = (self.out / "near" / name).read_table(found_name(shard)).slice(within, self.layout.rescored)
        found = Candidates.load(self.out / "plan" / name)
        rows, dropped = rescore(name, found, near, first, self.score, self.settings)
        write_found(self.out / "found" / name, item["shard"], rows, dropped)
        return {**item, "seconds": time.perf_counter() - started}
