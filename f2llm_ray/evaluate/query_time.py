"""How long a model takes to embed one query."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from f2llm_ray.evaluate.vectors import Embedder, evenly_drawn

QUERIES = 50


def query_ms(encoder: Embedder, queries: Sequence[str]) -> float:
    """Median milliseconds in which a model embeds one query by itself, over at most 50 of them, evenly drawn."""
    texts = [queries[place] for place in evenly_drawn(len(queries), QUERIES)]
    encoder.embed_counted(texts[:1])  # the first call also pays for what is made on first use
    took = []
    for text in texts:
        started = time.perf_counter()
        encoder.embed_counted([text])
        took.append(time.perf_counter() - started)
    return round(1000 * statistics.median(took), 3)
