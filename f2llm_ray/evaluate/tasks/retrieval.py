"""Retrieval quality: a set's texts as vectors, searched exactly and scored at each dim.

Shapes: q queries, c passages of the corpus, u distinct texts, d dim.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from f2llm_ray.engine.nearest import top_positions
from f2llm_ray.evaluate.encode import as_documents, as_queries, encode_distinct
from f2llm_ray.evaluate.metrics.by_type import by_type
from f2llm_ray.evaluate.metrics.ranking import METRICS, K, metrics
from f2llm_ray.evaluate.metrics.summary import Metric, Units, measured
from f2llm_ray.evaluate.tasks.task import Measured

if TYPE_CHECKING:
    from f2llm_ray.evaluate.encode import Encoder
    from f2llm_ray.evaluate.tasks.retrieval_set import RetrievalSet


def evaluate(encoder: Encoder, retrieval_set: RetrievalSet, divisors: Sequence[int]) -> Measured:
    """Encodes a set once and scores it at several dims.

    Queries carry the set's instruction where the model was trained with instructions.

    Args:
        encoder: the model.
        retrieval_set: what to find where.
        divisors: the dims, as the model's d divided by these.

    Raises:
        RunError: the model gives vectors that are not numbers.
    """
    started = time.perf_counter()
    queries = as_queries(encoder, retrieval_set.query_texts, retrieval_set.instruction)
    passages = as_documents(encoder, retrieval_set.corpus_texts)
    encoded = encode_distinct(encoder, [*queries, *passages])
    query_q, corpus_c = encoded.of(queries), encoded.of(passages)
    judged = retrieval_set.judgements
    by_dim = {
        dim: metrics(
            top_positions(cut_ud, query_q, corpus_c, k=K, left_out_q=judged.own_q, device=encoder.device),
            judged.relevant_r2,
            len(corpus_c),
            judged.grade_r,
        )
        for dim, cut_ud in encoded.at_dims(divisors)
    }
    found = measured(
        "retrieval",
        Units(retrieval_set.query_ids, retrieval_set.query_languages),
        {name: Metric(np.column_stack([values[name] for values in by_dim.values()])) for name in METRICS},
        list(by_dim),
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
