"""The loss of a stage: the vectors of a batch's texts in, the loss and its parts out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from f2llm_ray.data.schema import SourceFacts
from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine.encode import encode, passes_of
from f2llm_ray.model.checkpoint import matryoshka_dims
from f2llm_ray.model.dense import vector_dims
from f2llm_ray.model.families import Pooling
from f2llm_ray.model.vocabulary import TokenMap, remap
from f2llm_ray.train.loader import TrainBatch
from f2llm_ray.train.losses import Parts, TextPlaces, contrastive
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
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        pooling: Pooling,
        tokens_per_pass: int,
        tokens: TokenMap | None = None,
        projected_dims: int | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.pooling = backbone, pooling
        self.tokens_per_pass, self.tokens = tokens_per_pass, tokens
        self.projection: torch.nn.Linear | None = None
        if projected_dims is not None:
            self.projection = torch.nn.Linear(vector_dims(backbone), projected_dims, bias=False)
            # Starts as the identity: with as many dims as the teacher the loss starts as that without a map.
            torch.nn.init.eye_(self.projection.weight)

    def forward(self, tokens: list[Tokens]) -> torch.Tensor:
        """Vectors of texts before normalisation [n, d], followed by their projections where there is a map."""
        if self.tokens is not None:
            tokens = remap(tokens, self.tokens)
        v_nd = encode(self.backbone, tokens, pooling=self.pooling, tokens_per_pass=self.tokens_per_pass)
        return v_nd if self.projection is None else torch.cat([v_nd, self.projection(v_nd)], dim=1)


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
        """The student's own vectors [n, d] in the output of `Student`."""
        return v[:, : self.hidden]

    def __call__(self, v: torch.Tensor, batch: TrainBatch) -> tuple[torch.Tensor, Parts]:
        """The loss and its parts for this rank's part of a batch, from the output of `Student` for its texts."""
        task, v_nd = self.sources[batch.source].task, self.own(v)
        arrays = (batch.query, batch.passage, batch.negative, batch.passage_id, batch.query_id)
        places = TextPlaces(*(torch.from_numpy(array.copy()).to(v.device) for array in arrays))
        loss, parts = contrastive(v_nd, places, self.settings, task, self.dims)
        scores = None if batch.scores is None else torch.from_numpy(batch.scores.copy()).to(v_nd)
        inputs = TermInputs(v_nd=v_nd, places=places, settings=self.settings, scores_bk=scores)
        if self.teacher is not None:
            matched_nD = v_nd if self.projected_dims is None else v[:, self.hidden :]
            inputs = replace(inputs, matched_nD=matched_nD, teacher_nD=self.teacher(batch).to(v.device))
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
