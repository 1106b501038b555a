"""How long a query takes: to embed it, and to look for its nearest among a million vectors.

Shapes: n vectors, d dim, b = ceil(d / 8) bytes of signs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from f2llm_ray.base.optional import require
from f2llm_ray.data.schema import rng
from f2llm_ray.evaluate.encode import evenly_drawn
from f2llm_ray.evaluate.metrics.ranking import K

if TYPE_CHECKING:
    from f2llm_ray.evaluate.encode import Encoder

QUERIES = 50
SEARCHES = 7
NUMBERS = 1 << 24
"""In the vectors that are searched: 67 MB as float32, more than a core's caches hold."""
MILLION = 1_000_000


def query_ms(encoder: Encoder, queries: Sequence[str]) -> float:
    """Median milliseconds in which a model embeds one query by itself, over at most 50 of them, evenly drawn."""
    texts = [queries[place] for place in evenly_drawn(len(queries), QUERIES)]
    encoder.embed_counted(texts[:1])  # the first one also pays for what is made on first use
    return _median_ms([partial(encoder.embed_counted, [text]) for text in texts])


def search_ms(dims: Sequence[int]) -> dict[str, dict[str, float]]:
    """Milliseconds in which one thread finds the 10 nearest of a million vectors, by dim and type of vector.

    The search is exact, by faiss: a flat index of floats, its 8-bit scalar quantiser, and Hamming distance. The
    time does not depend on what the vectors are, so these are random; it is that of fewer ones, scaled.

    Raises:
        DataError: faiss is not installed.
    """
    faiss = require("faiss", extra="eval")
    faiss.omp_set_num_threads(1)
    return {str(dim): _search_ms(faiss, dim) for dim in dims}


def _search_ms(faiss: Any, dim: int) -> dict[str, float]:
    count = NUMBERS // dim
    vectors_nd = rng("search", dim).random((count, dim), dtype=np.float32) - np.float32(0.5)
    signs_nb = np.packbits(vectors_nd > 0, axis=1)
    inner = faiss.METRIC_INNER_PRODUCT
    indexes = {
        "float": (faiss.IndexFlatIP(dim), vectors_nd),
        "int8": (faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit, inner), vectors_nd),
        "binary": (faiss.IndexBinaryFlat(8 * signs_nb.shape[1]), signs_nb),
    }
    found = {}
    for kind, (index, stored) in indexes.items():
        if kind == "int8":
            index.train(stored[:MILLION])
        index.add(stored)
        queries = [stored[place : place + 1].copy() for place in range(SEARCHES)]
        index.search(queries[0], K)
        took = _median_ms([partial(index.search, query, K) for query in queries])
        found[kind] = round(took * MILLION / count, 3)
        index.reset()
    return found


def _median_ms(calls: Sequence[Callable[[], object]]) -> float:
    took = []
    for call in calls:
        started = time.perf_counter()
        call()
        took.append(time.perf_counter() - started)
    return round(1000 * statistics.median(took), 3)
