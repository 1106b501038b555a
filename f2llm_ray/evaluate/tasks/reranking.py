"""Reranking: are a query's relevant texts put before the others that come with it?

Equal cosines are ordered by the texts' content hashes, which favours no side: a model that gives all texts
one vector scores as chance does.

Shapes: q queries, n candidates of all queries, m dims.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from f2llm_ray.base.section import Content, Output
from f2llm_ray.data.decontaminate import Screened
from f2llm_ray.data.ragged import Ints
from f2llm_ray.data.reading.base import DEFAULT_INSTRUCTION
from f2llm_ray.data.schema import text_key
from f2llm_ray.evaluate.metrics.intervals import Values
from f2llm_ray.evaluate.metrics.ranking import K
from f2llm_ray.evaluate.metrics.weighted_metrics import Metrics, mean
from f2llm_ray.evaluate.tasks.labelled import Columns, LabelledFile, LabelledSet, Scoring
from f2llm_ray.evaluate.vectors import Embedder, as_documents, as_queries, cosines, embed_distinct


class RerankingSet(LabelledFile):
    """Queries, each with texts that answer it and texts that do not."""

    test: Content[str]
    """Table with the columns query, positive and negative, the latter two lists of texts."""
    instruction: Output[str] = DEFAULT_INSTRUCTION["retrieval"]
    """Said before each query to models trained with instructions."""


class Reranking(LabelledSet):
    """Queries, each with texts that answer it and texts that do not."""

    kind: ClassVar[str] = "reranking"
    section = RerankingSet
    columns: ClassVar[Columns] = {"test": {"query": "text", "positive": "texts", "negative": "texts"}}
    asked: ClassVar[tuple[str, ...]] = ("query",)
    metrics: ClassVar[Metrics] = dict.fromkeys(("map", "mrr@10", "ndcg@10"), mean)

    def check(self) -> None:
        """Raises DataError where a text is both positive and negative of its query."""
        for row, (positive, negative) in enumerate(self.rows("positive", "negative")):
            both = set(positive) & set(negative)
            if both:
                self.refuse(f"found {min(both)!r} in positive and in negative, expected it in one of them", row)

    def screened(self) -> Screened:
        """The queries, and the texts that answer them; the others answer nothing."""
        return Screened(self.values("query"), [text for texts in self.values("positive") for text in texts])

    def scoring(self, encoder: Embedder) -> Scoring:
        """Queries carry the instruction."""
        queries = as_queries(encoder, self.values("query"), self.instruction)
        candidates = [
            sorted({**dict.fromkeys(negative, False), **dict.fromkeys(positive, True)}.items(), key=_content)
            for positive, negative in self.rows("positive", "negative")
        ]
        texts = as_documents(encoder, [text for found in candidates for text, _ in found])
        relevant_n = np.array([relevant for found in candidates for _, relevant in found])
        query_n = np.repeat(np.arange(len(queries)), [len(found) for found in candidates])
        encoded = embed_distinct(encoder, [*queries, *texts])
        query_vector_n, vector_n = encoded.of(queries)[query_n], encoded.of(texts)
        return Scoring(
            encoded,
            lambda cut_ud: ranked(query_n, cosines(cut_ud, query_vector_n, vector_n), relevant_n),
            len(texts),
        )


def ranked(query_n: Ints, score_n: Values, relevant_n: np.ndarray) -> dict[str, Values]:
    """Metrics of each query over its candidates, equal scores in the order given.

    "map" is the mean over relevant candidates of the precision down to each; "mrr@10" is 1 / rank of the first
    relevant one, 0 beyond rank 10; "ndcg@10" is the sum of 1 / log2(rank + 1) over relevant candidates among the
    first 10, divided by the same sum with all of them on top.

    Args:
        query_n: the query of each candidate, ascending from 0 without gaps; each has a relevant candidate.
        score_n: the higher the earlier.
        relevant_n: whether it is relevant.

    Returns:
        By metric: [q].
    """
    order_n = np.lexsort((-score_n, query_n))
    hit_n = relevant_n[order_n].astype(np.float64)
    sizes_q = np.bincount(query_n)
    start_q = np.cumsum(sizes_q) - sizes_q
    rank_n = np.arange(len(query_n)) - np.repeat(start_q, sizes_q) + 1
    relevant_q = np.add.reduceat(hit_n, start_q)
    down_to_n = np.cumsum(hit_n) - np.repeat(np.cumsum(relevant_q) - relevant_q, sizes_q)
    top_n = rank_n <= K
    gain_n = 1 / np.log2(rank_n + 1)
    ideal_q = np.cumsum(1 / np.log2(np.arange(2, K + 2)))[np.minimum(relevant_q, K).astype(np.int64) - 1]
    return {
        "map": np.add.reduceat(hit_n * down_to_n / rank_n, start_q) / relevant_q,
        "mrr@10": np.maximum.reduceat(hit_n * top_n / rank_n, start_q),
        "ndcg@10": np.add.reduceat(hit_n * top_n * gain_n, start_q) / ideal_q,
    }


def _content(candidate: tuple[str, bool]) -> bytes:
    return text_key(candidate[0])
