"""Settings of training: a stage, its engine, distillation, and what is asked of the cluster."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from f2llm_ray.data.schema import TASKS, Task
from f2llm_ray.section import Section


class Engine(Section):
    """The DeepSpeed engine and the shape of the work on each worker."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16"] = "bf16"
    offload: bool = False
    """Optimizer state in host memory."""
    tokens_per_pass: int = Field(default=16_384, ge=64)
    """Token budget of one forward pass of the encoder; a micro-batch is cut into passes of similar lengths."""
    tokens_per_chunk: int | None = Field(default=None, ge=64)
    """GradCache: the activations of at most this many tokens are held at a time, at the cost of a second forward
    pass; unset holds those of the whole batch."""
    gradient_checkpointing: bool = False
    loader_prefetch: int = Field(default=4, ge=1)
    """Micro-batches that Ray Data keeps ready ahead of the step."""


class TrainStage(Section):
    """One contrastive stage. The defaults are those of the paper's public code."""

    tasks: tuple[Task, ...] = TASKS
    """Tasks whose sources are used."""
    sources: tuple[str, ...] | None = None
    """Names of the sources that are used; all with a fitting task when unset."""
    instructions: bool = True
    """Put each source's instruction before its queries."""
    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    """Ends the stage early; the schedule is stretched over the steps that are run."""
    global_batch: int = Field(default=512, ge=2)
    """Rows per optimizer step over all workers."""
    language_temperature: float = Field(default=1.0, ge=1)
    """Evens out the languages of a source: one of n rows is drawn in proportion to n^(1/temperature)."""
    length_window: int = Field(default=1, ge=1)
    """Global batches whose rows are sorted by length before they are cut, so that a batch has similar lengths; 1
    leaves lengths mixed."""
    negatives: dict[Task, int] = {"retrieval": 7, "clustering": 9, "classification": 1}
    """Hard negatives drawn per row and epoch."""
    temperature: float = Field(default=0.05, gt=0)
    temperatures: dict[Task, float] = {}
    """Another temperature for some tasks."""
    hard_negative_weight: float = Field(default=1.0, ge=0)
    in_batch_weight: float = Field(default=1.0, ge=0)
    absolute_margin: float | None = None
    """Negatives whose cosine is above the passage's minus this are taken for false ones and left out; -0.1 leaves
    out what is better than the passage by 0.1 (Qwen3-Embedding). Unset in the paper."""
    relative_margin: float | None = Field(default=None, ge=0, le=1)
    """The same with this share of the passage's cosine: 0.05 leaves out what is above 95 % of it."""
    matryoshka_min_dim: int = Field(default=8, ge=1)
    """Smallest matryoshka dim; the dims are its doublings below the hidden size, and the hidden size."""
    gather_gradient: bool = True
    """Gradient to other ranks' passages in the in-batch term; the paper's code has none."""
    lr: float = Field(default=8e-6, gt=0)
    min_lr: float = Field(default=1e-7, ge=0)
    warmup_steps: int = Field(default=500, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The last ones are kept; with `keep_best` those with the lowest validation loss, and the last."""
    keep_best: bool = False
    """Export the checkpoint with the lowest validation loss instead of the last step (paper: the last)."""
    engine: Engine = Engine()

    @model_validator(mode="after")
    def _rates(self) -> TrainStage:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must not exceed lr ({self.lr})")
        return self


class Distill(TrainStage):
    """Training of the pruned model towards a teacher, beside the contrastive loss; docs/distillation.md."""

    teacher: str
    """The model that teaches: "untrained" or one of `stages`, or the path of a model folder of any run and width.
    One with another tokenizer than the prepared data's needs cached vectors."""
    teacher_vectors: Literal["cached", "online"] = "cached"
    """Encode each distinct text of the stage's batches once, before it; or in every batch beside the student."""
    mse_weight: float = Field(default=1.0, ge=0)
    """Weight of the MSE between un-normalised vectors and the teacher's first dims (paper: 1)."""
    cosine_weight: float = Field(default=0.0, ge=0)
    """Weight of one minus the cosine of the two (Jasper and Stella, arXiv 2412.19048)."""
    similarity_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence between the teacher's and the student's softmax over the cosines of a query with
    the passages of all ranks."""
    similarity_temperature: float = Field(default=0.05, gt=0)
    projection: bool = False
    """MSE and cosine compare the teacher's whole vectors with a linear map of the student's, which is trained with
    it and left out of the exported model. Always so where the student has more dims than the teacher."""

    @property
    def uses_teacher(self) -> bool:
        """Whether any term needs the teacher's vectors."""
        return self.mse_weight + self.cosine_weight + self.similarity_weight > 0

    @property
    def matches_vectors(self) -> bool:
        """Whether a term compares single vectors, and not only similarities."""
        return self.mse_weight + self.cosine_weight > 0

    def teacher_dims(self, hidden: int | None) -> int | None:
        """How many of the teacher's first dims a student of this hidden size learns from; None for all of them."""
        return hidden if self.matches_vectors and not self.projection else None

    @model_validator(mode="after")
    def _projects_something(self) -> Distill:
        if self.projection and not self.matches_vectors:
            raise ValueError("projection: nothing is projected where mse_weight and cosine_weight are 0")
        return self


class Compute(Section):
    """What the run asks of the cluster."""

    workers: int = Field(default=1, ge=1)
    """World size of training."""
    workers_min: int | None = Field(default=None, ge=1)
    """Elastic training: goes on with this many workers or more, up to `workers`, as nodes come and go; each change
    starts again from the last checkpoint."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    gpus_per_worker: float = Field(default=0.0, ge=0)
    threads_per_worker: int = Field(default=1, ge=1)
    """Torch threads of a worker on CPU."""
    max_failures: int = Field(default=3, ge=0)
    """Times a stage goes on from its last checkpoint after losing a worker."""

    @model_validator(mode="after")
    def _elastic(self) -> Compute:
        if self.workers_min is not None and self.workers_min > self.workers:
            raise ValueError(f"workers_min ({self.workers_min}) must not exceed workers ({self.workers})")
        return self
