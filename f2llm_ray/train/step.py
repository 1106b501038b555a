"""One optimizer step: the gradients of its global batches, their mean, and their losses and counts.

Accumulated batches stay batches of their own, with their own in-batch negatives: a step has `accumulate` times as
many rows, but no larger contrastive batch. That is what GradCache makes (`train/gradcache.py`), at the cost of a
second forward pass, which accumulation does not need.
Shapes: A batches of the step, m values of each.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from f2llm_ray.train.deepspeed import step
from f2llm_ray.train.gradcache import cached_backward, engine_backward
from f2llm_ray.train.loader import TrainBatch
from f2llm_ray.train.objective import StageLoss, chunks_of, encoder_of, mean_over_ranks
from f2llm_ray.train.throughput import Flops, positions

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

COUNTS = ("tokens", "positions", "flops")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One global batch of a step, over all ranks."""

    source: str
    task: str
    loss: float
    tokens: int
    """Real tokens."""
    positions: int
    """Tokens and the padding that was computed with them."""
    flops: float


@dataclass(frozen=True)
class Done:
    """A finished step, the same on all ranks but for the time."""

    batches: list[Seen]
    values: dict[str, float]
    """Means over the batches: "loss" and its parts; and "gradient_norm", before clipping."""
    waited: float
    """Seconds that this rank waited for batches."""


def train_step(
    engine: DeepSpeedEngine, loss: StageLoss, coming: Iterator[TrainBatch], count: int, *, flops: Flops, world: int
) -> Done:
    """Moves the weights along the mean gradient of the next batches; every rank must call it.

    Args:
        engine: the engine, its learning rate set.
        loss: the stage's loss.
        coming: this rank's parts of the global batches.
        count: how many of them make up the step.
        flops: counts the FLOPs of texts.
        world: number of workers.
    """
    waited, sources, own = 0.0, list[str](), list[dict[str, torch.Tensor]]()
    for place in range(count):
        asked = time.monotonic()
        batch = next(coming)
        waited += time.monotonic() - asked
        sources.append(batch.source)
        own.append(_backward(engine, loss, batch, flops, share=1 / count, last=place == count - 1))
    norm = step(engine)
    names = list(own[0])
    own_Am = torch.stack([torch.stack([seen[name] for name in names]) for seen in own])
    mean_Am = torch.tensor(mean_over_ranks(own_Am.flatten(), world), dtype=torch.float64).view_as(own_Am)
    found = [dict(zip(names, mean_m, strict=True)) for mean_m in mean_Am.tolist()]
    batches = [
        Seen(
            source=source,
            task=loss.sources[source].task,
            loss=seen["loss"],
            tokens=round(seen["tokens"] * world),
            positions=round(seen["positions"] * world),
            flops=seen["flops"] * world,
        )
        for source, seen in zip(sources, found, strict=True)
    ]
    means = dict(zip(names, mean_Am.mean(0).tolist(), strict=True))
    return Done(batches, {n: v for n, v in means.items() if n not in COUNTS} | {"gradient_norm": norm}, waited)


def _backward(
    engine: DeepSpeedEngine, loss: StageLoss, batch: TrainBatch, flops: Flops, *, share: float, last: bool
) -> dict[str, torch.Tensor]:
    """Adds a share of a batch's gradient to the step's; returns this rank's loss, parts and counts in float64."""
    backward, backbone, settings = engine_backward(engine), engine.module.backbone, loss.settings.engine
    chunks = chunks_of(engine, loss.settings, batch)
    value, parts = cached_backward(
        encoder_of(engine, batch),
        chunks,
        lambda v: loss(v, batch),
        lambda scalar, ends: backward(scalar * share, ends and last),
    )
    counts = (
        sum(map(len, batch.tokens)),
        positions(backbone, batch.tokens, chunks, settings.tokens_per_pass),
        flops(batch.tokens),
    )
    dims = sorted(loss.dims, reverse=True)
    seen = {
        "loss": value,
        **{name: value.new_tensor(count, dtype=torch.float64) for name, count in zip(COUNTS, counts, strict=True)},
        **{f"loss_at_{dim}": part for dim, part in zip(dims, parts.total_m, strict=True)},
        **{f"loss_{name}": term for name, term in parts.terms.items()},
        **{f"loss_first_{layers}_layers": found for layers, found in parts.by_exit.items()},
    }
    return {name: found.detach().double() for name, found in seen.items()}
