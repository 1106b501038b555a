"""What a batch costs: the vectors of its texts in, the stage's loss out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from f2llm_ray.model.checkpoint import load_backbone, matryoshka_dims
from f2llm_ray.model.encoder import encode
from f2llm_ray.recipe import Distill, Recipe, TrainStage
from f2llm_ray.run import Folder
from f2llm_ray.train.loader import Batch
from f2llm_ray.train.losses import Places, contrastive_loss, distillation_loss

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

    def __call__(self, v_nd: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The loss of this rank's part of a batch, from the vectors [n, d] of its distinct texts."""

        def tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
            return torch.from_numpy(array.copy()).to(v_nd.device)

        loss = contrastive_loss(
            v_nd,
            Places(*(tensor(a) for a in (batch.query, batch.passage, batch.negative, batch.passage_id))),
            dims=matryoshka_dims(v_nd.shape[1], self.stage.matryoshka_min_dim),
            temperature=self.stage.temperature,
            in_batch=self.recipe.sources[batch.source].task == "retrieval",
            gather_gradient=self.stage.gather_gradient,
        )
        if self.teacher is not None and isinstance(self.stage, Distill):
            loss = loss + self.stage.mse_weight * distillation_loss(v_nd, self.teacher(batch))
        return loss


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
        losses = [loss(engine(batch.tokens).float(), batch) for batch in batches]
    engine.train()
    return mean_over_ranks(torch.stack(losses).mean(0, keepdim=True), world)[0] if losses else None
