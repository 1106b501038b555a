"""Work for the planner's tests: TEXTS texts of LENGTH tokens on each of two workers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from f2llm_ray.model.sizes import Shape
from f2llm_ray.plan.stage_work import StageWork

VOCABULARY, TEXTS, LENGTH = 500, 8, 40
TOKENS = TEXTS * LENGTH
# Every matrix has over 100,000 entries: ZeRO-3 leaves smaller ones whole on every worker, in real models norms.
SHAPE = Shape(hidden=256, layers=2, heads=4, kv_heads=4, head_dim=128, ffn=512)
SHAPES = [SHAPE, Shape(hidden=48, layers=3, heads=6, kv_heads=2, head_dim=32, ffn=80)]


def work_of(shape: Shape = SHAPE, **changes: Any) -> StageWork:
    """The texts in one pass and one chunk, unless told otherwise."""
    work = StageWork(
        stage="stage1",
        shape=shape,
        vocabulary=VOCABULARY,
        teacher=None,
        float_bytes=4,
        zero_stage=0,
        offload=False,
        gradient_checkpointing=False,
        world=2,
        epochs=1,
        max_steps=None,
        rows_per_batch=TEXTS,
        accumulate=1,
        texts_per_row=2,
        longest_text_tokens=LENGTH,
        tokens_per_pass=TOKENS,
        tokens_per_chunk=None,
    )
    return replace(work, **changes)


def texts() -> list[Any]:
    return [np.full(LENGTH, text, dtype=np.uint32) for text in range(TEXTS)]
