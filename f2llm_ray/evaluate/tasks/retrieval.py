"""Retrieval quality: a set's texts as vectors, searched exactly and scored at each dim.

Shapes: q queries, c passages of the corpus, u distinct texts, d dim.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from f2llm_ray.engine.nearest import top_positions
from f2llm_ray.evaluate.metrics.by_type import by_type
from f2llm_ray.evaluate.metrics.ranking import K, metrics
from f2llm_ray.evaluate.metrics.scores import measured, units_table
from f2llm_ray.evaluate.tasks.task import Measured
from f2llm_ray.evaluate.vectors import Embedder, as_documents, as_queries, embed_distinct

if TYPE_CHECKING:
    from f2llm_ray.evaluate.tasks.retrieval_set import RetrievalSet


def evaluate(encoder: Embedder, retrieval_set: RetrievalSet, divisors: Sequence[int]) -> Measured:
    """Encodes a set once and scores it at several dims.

    Queries carry the set's instruction where the model was trained with instructions.

    Args:
        encoder: the model.
        retrieval_set: what to find where.
        divisors: the dims, as the model's d divided by these.

    Raises:
        RunError: the model returns vectors with NaN or infinity.
    """
    started = time.perf_counter()
    queries = as_queries(encoder, retrieval_set.query_texts, retrieval_set.instruction)
    passages = as_documents(encoder, retrieval_set.corpus_texts)
    encoded = embed_distinct(encoder, [*queries, *passages])
    query_q, corpus_c = encoded.of(queries), encoded.of(passages)
    judged = retrieval_set.judgements
    found = measured(
        retrieval_set.kind,
        retrieval_set.metrics,
        units_table(retrieval_set.query_ids, retrieval_set.query_languages),
        {
            dim: metrics(
                top_positions(cut_ud, query_q, corpus_c, k=K, left_out_q=judged.own_q, device=encoder.device),
                judged.relevant_r2,
                len(corpus_c),
                judged.grade_r,
            )
            for dim, cut_ud in encoded.at_dims(divisors)
        },
        corpus=len(corpus_c),
        tokens=encoded.tokens,
        started=started,
    )
    found.scores["types"] = by_type(
        encoded.vectors_ud,
        query_q,
        corpus_c,
        judged,
        encoder.info.dims,
        encoder.ranges,
        encoder.device,
    )
    return found
