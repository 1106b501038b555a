"""Whether a stage fits into the memory of a GPU, and which settings to change where it does not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from f2llm_ray.plan.cost import extra_forwards
from f2llm_ray.plan.memory import memory
from f2llm_ray.plan.stage_work import FLOAT32_BYTES, StageWork

USABLE = 0.9
"""Share of a GPU's memory that a plan may fill; the rest is for CUDA's context and libraries, the gradients of the
activations of one layer, and the allocator's fragmentation."""
WORLD = "world"
"""Name of the number of GPUs among the changes; the others are settings of the engine."""


def fits(work: StageWork, gpu_memory_bytes: float) -> bool:
    """Whether the work fits into the usable part of a GPU."""
    return memory(work).total_bytes <= USABLE * gpu_memory_bytes


def variants(work: StageWork) -> Iterator[StageWork]:
    """The same work at each ZeRO stage, without and with offload where DeepSpeed has it.

    Without ZeRO there is no bf16 (see `Recipe`).
    """
    for zero_stage in (0, 1, 2, 3) if work.float_bytes == FLOAT32_BYTES else (1, 2, 3):
        for offload in (False, True) if zero_stage else (False,):
            yield replace(work, zero_stage=zero_stage, offload=offload)


def changes(work: StageWork, gpu_memory_bytes: float) -> dict[str, Any] | None:
    """The settings to change so that the work fits; empty where it fits already, None where no change helps.

    Of all changes that fit, it takes the cheapest, which avoid in this order: more GPUs; offload; ZeRO-3, which
    fetches weights for every pass; chunks smaller than a pass, since gradients are reduced for each; more forward
    passes (checkpointing and GradCache take about one each); small chunks; a high ZeRO stage.
    """
    worlds = [world for power in range(12) if not work.rows_per_batch % (world := work.world << power)]
    choices = product(
        worlds,
        sorted({work.offload, True}),
        sorted({work.zero_stage, *range(max(work.zero_stage, 2), 4)}),
        _chunks(work),
        sorted({work.gradient_checkpointing, True}),
    )
    names = (WORLD, "offload", "zero_stage", "tokens_per_chunk", "gradient_checkpointing")
    changed = (replace(work, **dict(zip(names, choice, strict=True))) for choice in choices)
    fitting = [each for each in changed if (each.zero_stage or not each.offload) and fits(each, gpu_memory_bytes)]
    if not fitting:
        return None
    best = min(fitting, key=_expense)
    return {name: getattr(best, name) for name in names if getattr(best, name) != getattr(work, name)}


def _expense(work: StageWork) -> tuple[float, ...]:
    again = extra_forwards(work, work.longest_text_tokens, work.most_tokens_per_worker)
    chunk = work.tokens_per_chunk or math.inf
    small = chunk < work.tokens_per_pass
    return (work.world, work.offload, work.zero_stage == 3, small, again, -chunk, work.zero_stage)


def _chunks(work: StageWork) -> list[int | None]:
    """The present chunk size, then that of a pass and its halvings, down to the longest text."""
    halvings = [work.tokens_per_pass >> power for power in range(work.tokens_per_pass.bit_length())]
    least = max(work.longest_text_tokens, 64)  # the recipe takes no fewer
    now = work.tokens_per_chunk
    return [now, *(chunk for chunk in halvings if chunk >= least and (now is None or chunk < now))]
