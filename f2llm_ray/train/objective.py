"""The loss of a stage: the vectors of a batch's texts in, the loss and its parts out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from f2llm_ray.data.schema import SourceFacts, Task
from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine.encode import encode, passes_of
from f2llm_ray.model.checkpoint import matryoshka_dims
from f2llm_ray.model.dense import vector_dims
from f2llm_ray.model.families import Pooling
from f2llm_ray.model.vocabulary import TokenMap, remap
from f2llm_ray.train.loader import TrainBatch
from f2llm_ray.train.losses import Parts, TextPlaces, contrastive, mean_parts
from f2llm_ray.train.settings import Distill, TrainStage
from f2llm_ray.train.teacher import TeacherVectors
from f2llm_ray.train.terms import TermInputs, added_terms

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedModel


class Student(torch.nn.Module):
    """The encoder as one module: the engine runs one forward for some texts, however many passes they take.

    Args:
        backbone: the model that is trained.
        pooling: how its vectors come of its tokens.
        tokens_per_pass: token budget of a pass.
        tokens: maps the prepared data's tokens to the model's, where its vocabulary was cut.
        projected_dims: dims of the linear map that distillation trains beside it; none without one.
        exits: numbers of layers after which the model is trained to be cut, too.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        pooling: Pooling,
        tokens_per_pass: int,
        tokens: TokenMap | None = None,
        projected_dims: int | None = None,
        exits: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.backbone, self.pooling, self.exits = backbone, pooling, tuple(exits)
        self.tokens_per_pass, self.tokens = tokens_per_pass, tokens
        self.projection: torch.nn.Linear | None = None
        if projected_dims is not None:
            self.projection = torch.nn.Linear(vector_dims(backbone), projected_dims, bias=False)
            # Starts as the identity: with as many dims as the teacher the loss starts as that without a map.
            torch.nn.init.eye_(self.projection.weight)

    def forward(self, tokens: list[Tokens]) -> torch.Tensor:
        """Vectors of texts before normalisation, side by side [n, ...], as `StageLoss` takes them.

        The whole model's [n, d], those of each exit, and where there is a map their projections in that order.
        """
        if self.tokens is not None:
            tokens = remap(tokens, self.tokens)
        vectors = encode(
            self.backbone,
            tokens,
            pooling=self.pooling,
            tokens_per_pass=self.tokens_per_pass,
            exits=self.exits,
        )
        if self.projection is None:
            return vectors
        of_exits = vectors.split(self.projection.in_features, dim=1)
        return torch.cat([vectors, *map(self.projection, of_exits)], dim=1)


class StageLoss:
    """The loss of a stage's batches.

    Args:
        settings: the stage's settings.
        sources: the sources by name.
        hidden: the dims d of the vectors of the model that is trained.
        teacher: returns the vectors to learn, when distilling.
        dims: the matryoshka dims, where they are the teacher's; those of the settings when unset.
    """

    def __init__(
        self,
        settings: TrainStage,
        sources: Mapping[str, SourceFacts],
        hidden: int,
        teacher: TeacherVectors | None = None,
        dims: Sequence[int] | None = None,
    ) -> None:
        self.settings, self.sources, self.hidden, self.teacher = settings, sources, hidden, teacher
        self.dims = tuple(dims or matryoshka_dims(hidden, settings.matryoshka_min_dim))

    @property
    def projected_dims(self) -> int | None:
        """The teacher's dims, where the student's vectors are projected to them; None where they are not."""
        if self.teacher is None or not isinstance(self.settings, Distill) or not self.settings.matches_vectors:
            return None
        fewer = self.hidden < self.teacher.dims and not self.teacher.nested
        wanted = self.settings.projection or self.hidden > self.teacher.dims or fewer
        return self.teacher.dims if wanted else None

    def own(self, v: torch.Tensor) -> torch.Tensor:
        """The whole student's own vectors [n, d] in the output of `Student`."""
        return v[:, : self.hidden]

    def __call__(self, v: torch.Tensor, batch: TrainBatch) -> tuple[torch.Tensor, Parts]:
        """The loss and its parts for this rank's part of a batch, from the output of `Student` for its texts.

        With exits it is the mean of the losses that each, a model of its own, and the whole model would have.
        """
        models = 1 + len(self.settings.exits)
        own = v[:, : models * self.hidden].split(self.hidden, dim=1)
        width = self.projected_dims
        matched = own if width is None else v[:, models * self.hidden :].split(width, dim=1)
        arrays = (batch.query, batch.passage, batch.negative, batch.passage_id, batch.query_id)
        shared = TermInputs(
            v_nd=own[0],
            places=TextPlaces(*(torch.from_numpy(array.copy()).to(v.device) for array in arrays)),
            settings=self.settings,
            scores_bk=None if batch.scores is None else torch.from_numpy(batch.scores.copy()).to(v),
            teacher_nD=None if self.teacher is None else self.teacher(batch).to(v.device),
        )
        task = self.sources[batch.source].task
        each = (
            replace(shared, v_nd=v_nd, matched_nD=None if shared.teacher_nD is None else matched_nD)
            for v_nd, matched_nD in zip(own, matched, strict=True)
        )
        found = [self._of_model(inputs, task) for inputs in each]
        losses = torch.stack([loss for loss, _ in found])
        by_exit = dict(zip(self.settings.exits, losses[1:].detach(), strict=True))
        return losses.mean(), replace(mean_parts([parts for _, parts in found]), by_exit=by_exit)

    def _of_model(self, inputs: TermInputs, task: Task) -> tuple[torch.Tensor, Parts]:
        """Loss and parts of one model."""
        loss, parts = contrastive(inputs.v_nd, inputs.places, self.settings, task, self.dims)
        added, terms = added_terms(inputs)
        return loss + added, replace(parts, terms=terms)


def chunks_of(engine: DeepSpeedEngine, stage: TrainStage, batch: TrainBatch) -> list[list[int]]:
    """The chunks in which a batch's texts go through the engine: one chunk unless the settings bound its tokens.

    With ZeRO-3 a chunk is one pass of the encoder, since all ranks must fetch the partitioned weights equally
    often: the number of passes in a chunk would differ between ranks, and one would wait forever.
    """
    settings, backbone = stage.engine, engine.module.backbone
    budget = settings.tokens_per_chunk
    if settings.zero_stage == 3:
        budget = min(budget or settings.tokens_per_pass, settings.tokens_per_pass)
    if budget is None:
        return [list(range(len(batch.tokens)))]
    # As the encoder reads them: with fewer tokens in the vocabulary texts take more of them.
    return passes_of(backbone, remap(batch.tokens, engine.module.tokens), budget)


def encoder_of(engine: DeepSpeedEngine, batch: TrainBatch) -> Callable[[Sequence[int]], torch.Tensor]:
    """A function that returns the vectors [c, d] of the texts at some places of a batch, through the engine."""
    return lambda chunk: engine([batch.tokens[place] for place in chunk]).float()


def mean_over_ranks(values: torch.Tensor, world: int) -> list[float]:
    """The means of some values [n] over all ranks."""
    values = values.detach().clone()
    if world > 1:
        torch.distributed.all_reduce(values)
    means: list[float] = (values / world).tolist()
    return means
