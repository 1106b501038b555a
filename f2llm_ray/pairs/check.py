"""The consistency check: a query is kept only if a model finds its own passage by it.

The idea is round-trip consistency (Alberti et al. 2019, arXiv 1906.05416), checked with a retriever as in
Promptagator (arXiv 2209.11755).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from f2llm_ray.data.ragged import Ints
from f2llm_ray.data.reading.base import DEFAULT_INSTRUCTION
from f2llm_ray.engine.other_models import on_disk, open_folder
from f2llm_ray.evaluate.vectors import as_documents, as_queries, embed_distinct
from f2llm_ray.run.folder import Folder


def found_again(
    model: Folder | str, queries: Sequence[str], own_q: Ints, passages: Sequence[str], top: int
) -> list[bool]:
    """Whether the own passage of each query is among the `top` nearest of all passages, on the cluster.

    Args:
        model: a model folder, of ours or of sentence-transformers, or the name of one on the hub.
        queries: their texts.
        own_q: the place of each query's passage among the passages [q].
        passages: distinct texts.
        top: how near it must be.

    Raises:
        RunError: no such model, or one whose vectors are not numbers.
    """
    import ray

    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus)(_found_again).options(name="pairs: check")
    found: list[bool] = ray.get(task.remote(model, queries, own_q, passages, top))
    return found


def _found_again(
    model: Folder | str, queries: Sequence[str], own_q: Ints, passages: Sequence[str], top: int
) -> list[bool]:
    import torch

    from f2llm_ray.engine.nearest import top_positions

    torch.set_num_threads(os.cpu_count() or 1)  # nothing else runs by then
    with on_disk(model) as path:
        encoder = open_folder(path)
        asked = as_queries(encoder, queries, DEFAULT_INSTRUCTION["retrieval"])
        corpus = as_documents(encoder, passages)
        vectors = embed_distinct(encoder, [*asked, *corpus])
        top_qk = top_positions(
            vectors.vectors_ud, vectors.of(asked), vectors.of(corpus), k=top, device=encoder.device
        )
    return [bool(found) for found in (top_qk == own_q[:, None]).any(axis=1)]
