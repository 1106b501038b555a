"""What a batch costs: the vectors of its texts in, the stage's loss out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from f2llm_ray.model.checkpoint import load_backbone, matryoshka_dims
from f2llm_ray.model.encoder import encode, plan
from f2llm_ray.recipe import Recipe
from f2llm_ray.run import Folder
from f2llm_ray.train.cache import encode_chunks
from f2llm_ray.train.loader import Batch
from f2llm_ray.train.losses import Objective, Parts, Places, contrastive, distillation_loss
from f2llm_ray.train.settings import Distill, TrainStage

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Teacher:
    """A frozen model whose vectors the student learns; run on the same texts in the same order."""

    def __init__(self, folder: Path, tokens_per_pass: int, device: str) -> None:
        self.backbone = load_backbone(folder).to(device).eval()
        self.tokens_per_pass = tokens_per_pass

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The teacher's vectors [n, D] of the batch's texts, before normalisation."""
        with torch.no_grad():
            return encode(self.backbone, batch.tokens, tokens_per_pass=self.tokens_per_pass).float()


@contextmanager
def teacher_from(folder: Folder | None, tokens_per_pass: int) -> Iterator[Teacher | None]:
    """The teacher of a model folder, None without one."""
    if folder is None:
        yield None
        return
    with folder.as_local() as path:
        yield Teacher(path, tokens_per_pass, "cuda" if torch.cuda.is_available() else "cpu")


class StageLoss:
    """The loss of a stage's batches."""

    def __init__(self, recipe: Recipe, stage: TrainStage, teacher: Teacher | None) -> None:
        self.recipe, self.stage, self.teacher = recipe, stage, teacher

    def __call__(self, v_nd: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Parts]:
        """The loss of this rank's part of a batch, from the vectors [n, d] of its texts, and its parts."""
        stage, task = self.stage, self.recipe.sources[batch.source].task
        objective = Objective(
            dims=tuple(matryoshka_dims(v_nd.shape[1], stage.matryoshka_min_dim)),
            temperature=stage.temperatures.get(task, stage.temperature),
            in_batch=task == "retrieval",
            gather_gradient=stage.gather_gradient,
            hard_negative_weight=stage.hard_negative_weight,
            in_batch_weight=stage.in_batch_weight,
            absolute_margin=stage.absolute_margin,
            relative_margin=stage.relative_margin,
        )
        arrays = (batch.query, batch.passage, batch.negative, batch.passage_id, batch.query_id)
        places = Places(*(torch.from_numpy(array.copy()).to(v_nd.device) for array in arrays))
        loss, parts = contrastive(v_nd, places, objective)
        if self.teacher is not None and isinstance(stage, Distill):
            loss = loss + stage.mse_weight * distillation_loss(v_nd, self.teacher(batch))
        return loss, parts


def chunks_of(engine: DeepSpeedEngine, stage: TrainStage, batch: Batch) -> list[list[int]]:
    """The chunks in which a batch's texts go through the engine: all at once unless the recipe bounds them.

    Where ZeRO-3 keeps weights in parts a chunk is one pass of the encoder, since all ranks must fetch them equally
    often: passes of a chunk would differ between ranks, and one would wait for ever.
    """
    settings, backbone = stage.engine, engine.module.backbone
    if settings.zero_stage == 3:
        budget = min(settings.tokens_per_chunk or settings.tokens_per_pass, settings.tokens_per_pass)
        return plan(backbone, batch.tokens, budget)
    if settings.tokens_per_chunk is not None:
        return plan(backbone, batch.tokens, settings.tokens_per_chunk)
    return [list(range(len(batch.tokens)))]


def encoder_of(engine: DeepSpeedEngine, batch: Batch) -> Callable[[Sequence[int]], torch.Tensor]:
    """Gives the vectors [c, d] of the texts at some places of a batch, through the engine."""
    return lambda chunk: engine([batch.tokens[place] for place in chunk]).float()


def mean_over_ranks(values: torch.Tensor, world: int) -> list[float]:
    """The means of some values [n] over all ranks."""
    values = values.detach().clone()
    if world > 1:
        torch.distributed.all_reduce(values)
    means: list[float] = (values / world).tolist()
    return means


def validate(engine: DeepSpeedEngine, loss: StageLoss, batches: Iterable[Batch], world: int) -> float | None:
    """Mean loss over held-out batches, taken as in training; None without any."""
    engine.eval()
    with torch.no_grad():
        losses = [
            loss(encode_chunks(encoder_of(engine, batch), chunks_of(engine, loss.stage, batch)), batch)[0]
            for batch in batches
        ]
    engine.train()
    return mean_over_ranks(torch.stack(losses).mean(0, keepdim=True), world)[0] if losses else None
