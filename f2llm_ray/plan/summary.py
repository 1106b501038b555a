"""All numbers of a stage's plan as one mapping, with units in the names, as `jobs/plan.py --json` prints them."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.model.sizes import non_embedding_parameters, parameters
from f2llm_ray.plan.advice import USABLE, changes, fits, variants
from f2llm_ray.plan.cost import cost, forward_flops_per_token
from f2llm_ray.plan.memory import host_bytes, memory
from f2llm_ray.plan.stage_work import Cluster, CorpusSize, StageWork, corpus_size, stage_work
from f2llm_ray.recipe.recipe import Recipe


def stage_numbers(work: StageWork, texts: CorpusSize, cluster: Cluster) -> dict[str, Any]:
    """All numbers of one stage."""
    memory_bytes = cluster.gpu_memory_bytes
    changed = changes(work, memory_bytes)
    return {
        "stage": work.stage,
        "parameters": parameters(work.shape, work.vocabulary),
        "non_embedding_parameters": non_embedding_parameters(work.shape),
        "work": {
            **asdict(work),
            "shape": work.shape.model_dump(),
            "teacher": work.teacher and {**asdict(work.teacher), "shape": work.teacher.shape.model_dump()},
            "most_tokens_per_worker": work.most_tokens_per_worker,
            "longest_chunk_tokens": work.longest_chunk_tokens,
            "chunks": work.chunks(work.most_tokens_per_worker),
        },
        "texts": asdict(texts),
        "cost": asdict(cost(work, texts, cluster)),
        "forward_flops_per_token": forward_flops_per_token(work.shape, texts.tokens_per_row / work.texts_per_row),
        "usable_bytes": USABLE * memory_bytes,
        "memory": [memory_numbers(each, memory_bytes) for each in variants(work)],
        "fits": fits(work, memory_bytes),
        "changes": changed,
        "changed_memory": memory_numbers(replace(work, **changed), memory_bytes) if changed else None,
    }


def memory_numbers(work: StageWork, gpu_memory_bytes: float) -> dict[str, Any]:
    """One row of the memory table."""
    parts = memory(work)
    return {
        "zero_stage": work.zero_stage,
        "offload": work.offload,
        **asdict(parts),
        "total_bytes": parts.total_bytes,
        "host_bytes": host_bytes(work),
        "fits": fits(work, gpu_memory_bytes),
    }


def stage_hours(recipe: Recipe, stage: str, cluster: Cluster) -> float | None:
    """Hours that a training stage takes at most, without those of computing a cached teacher's vectors.

    None where they cannot be computed: the recipe trains on CPUs, a model's shape is not known without a download,
    the GPUs cannot share the batch, or a source has no cap.
    """
    if recipe.compute.gpus_per_worker == 0:
        return None
    try:
        work = stage_work(recipe, stage, cluster.world)
    except RecipeError:
        return None
    return cost(work, corpus_size(recipe, work), cluster).hours
