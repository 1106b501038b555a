"""The training loop of one worker: batches in, an exported model out, a checkpoint every so many steps."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from f2llm_ray.data.batches import BatchTable
from f2llm_ray.errors import RunError
from f2llm_ray.recipe import Distill, Recipe, TrainStage
from f2llm_ray.run import Folder
from f2llm_ray.train.board import post
from f2llm_ray.train.loader import Batch, read, stream
from f2llm_ray.train.zero import learning_rate, set_learning_rate, start_engine

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedModel

    from f2llm_ray.model.checkpoint import ModelInfo


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker is told; plain values and folders, so that it travels anywhere."""

    recipe: Recipe
    name: str
    stage: TrainStage
    sources: tuple[str, ...]
    student: Folder
    """The model folder that training starts from."""
    teacher: Folder | None
    tokens: Folder
    """The token store."""
    batches: Folder
    """The stage's batch tables."""
    out: Folder
    """Gets the exported model."""
    run_id: str
    """Names the progress board."""


def work(config: dict[str, Any]) -> None:
    """The function Ray Train runs on every worker."""
    import ray.train
    import torch

    job: Job = config["job"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(job.recipe.compute.threads_per_worker)
    torch.manual_seed(job.recipe.seed)
    with (
        job.student.as_local() as student,
        job.tokens.as_local() as store,
        job.batches.as_local() as batches,
        _teacher(job) as teacher,
    ):
        try:
            Worker(job, rank, world, student, store, batches, teacher).run()
        except Exception as error:
            # Ray Train tries again from the last checkpoint: the driver must not wait through that in silence.
            post(job.run_id, error=f"worker {rank} failed: {type(error).__name__}: {error}")
            raise


class Worker:
    """One rank's engine, batches and position in the stage."""

    def __init__(
        self, job: Job, rank: int, world: int, student: Path, store: Path, batches: Path, teacher: Teacher | None
    ) -> None:
        import torch

        from f2llm_ray.model.checkpoint import load_backbone, load_info, load_tokenizer

        self.job, self.rank, self.world, self.store, self.teacher = job, rank, world, store, teacher
        self.table = BatchTable(batches / "train", job.sources)
        self.validation = BatchTable(batches / "validation", job.sources)
        self.steps = len(self.table.order())
        self.first = _first_step()
        # Begun before the model is loaded: Ray Data takes as long to start.
        self.batches = stream(
            self.table,
            store,
            first_step=self.first,
            rank=rank,
            world=world,
            prefetch=job.stage.engine.loader_prefetch,
        )
        self.info, self.tokenizer = load_info(student), load_tokenizer(student)
        backbone = load_backbone(student)
        if job.stage.engine.gradient_checkpointing:
            backbone.gradient_checkpointing_enable()
        self.engine = start_engine(_encoder_module(backbone, job.stage), job.stage, world)
        self.device = self.engine.device
        self.losses: list[tuple[int, float]] = []
        self.validation_losses: list[tuple[int, float]] = []
        self.tokens = 0
        self.seconds = 0.0
        self.torch = torch

    def run(self) -> None:
        """Trains from the last checkpoint (or the start) to the end, and exports the model."""
        self._restore()
        self.engine.train()
        started, waited = time.monotonic(), 0.0
        for step in range(self.first, self.steps):
            asked = time.monotonic()
            batch = next(self.batches)
            waited += time.monotonic() - asked
            set_learning_rate(self.engine, learning_rate(self.job.stage, step, self.steps))
            loss = self._loss(batch)
            self.engine.backward(loss)
            self.engine.step()
            self._record(step, batch, loss)
            self.seconds += time.monotonic() - asked
            done = step + 1
            self._show(done, stall=waited / (time.monotonic() - started))
            if done % self.job.stage.checkpoint_every == 0 and done < self.steps:
                self._checkpoint(done)
        self._validate(self.steps)
        self._export()
        self._report(self.steps, checkpoint=None)

    def _loss(self, batch: Batch) -> torch.Tensor:
        from f2llm_ray.model.checkpoint import matryoshka_dims
        from f2llm_ray.train.losses import Places, contrastive_loss, distillation_loss

        stage = self.job.stage
        v_nd = self.engine(batch.tokens).float()
        places = Places(*(self._tensor(a) for a in (batch.query, batch.passage, batch.negative, batch.passage_id)))
        loss = contrastive_loss(
            v_nd,
            places,
            dims=matryoshka_dims(v_nd.shape[1], stage.matryoshka_min_dim),
            temperature=stage.temperature,
            in_batch=self.job.recipe.sources[batch.source].task == "retrieval",
            gather_gradient=stage.gather_gradient,
        )
        if self.teacher is not None and isinstance(stage, Distill):
            loss = loss + stage.mse_weight * distillation_loss(v_nd, self.teacher(batch))
        return loss

    def _tensor(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        return self.torch.from_numpy(array.copy()).to(self.device)

    def _record(self, step: int, batch: Batch, loss: torch.Tensor) -> None:
        mean = self._mean(loss.detach())
        if not math.isfinite(mean):
            raise RunError(
                f"stage {self.job.name!r}, step {step}: the loss is {mean} on a batch of source {batch.source!r}; "
                "lower the learning rate, or look at that source"
            )
        self.losses.append((step + 1, round(mean, 6)))
        self.tokens += self.world * sum(len(text) for text in batch.tokens)

    def _mean(self, value: torch.Tensor) -> float:
        value = value.clone()
        if self.world > 1:
            self.torch.distributed.all_reduce(value)
        return float(value) / self.world

    def _validate(self, step: int) -> None:
        """Mean loss over the held-out rows, batch by batch as in training."""
        self.engine.eval()
        total, count = 0.0, 0
        with self.torch.no_grad():
            for batch in read(self.validation, self.store, rank=self.rank, world=self.world):
                total, count = total + self._mean(self._loss(batch)), count + 1
        self.engine.train()
        if count:
            self.validation_losses.append((step, round(total / count, 6)))

    # Checkpoints.

    def _state(self) -> dict[str, Any]:
        return {
            "losses": self.losses,
            "validation_losses": self.validation_losses,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "rng": self.torch.get_rng_state(),
        }

    def _checkpoint(self, step: int) -> None:
        import ray.train

        self._validate(step)
        with tempfile.TemporaryDirectory(prefix="f2llm-") as folder:
            self.engine.save_checkpoint(folder, tag="state", client_state=self._state())
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            checkpoint.set_metadata({"step": step})
            self._report(step, checkpoint=checkpoint)

    def _restore(self) -> None:
        """Loads the run's last checkpoint, if it has one."""
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            _, state = self.engine.load_checkpoint(folder, tag="state")
        self.losses, self.validation_losses = state["losses"], state["validation_losses"]
        self.tokens, self.seconds = state["tokens"], state["seconds"]
        self.torch.set_rng_state(state["rng"])

    def _report(self, step: int, checkpoint: Any) -> None:
        import ray.train

        metrics = {
            "step": step,
            "loss": self.losses[-1][1] if self.losses else None,
            "validation_loss": self.validation_losses[-1][1] if self.validation_losses else None,
        }
        ray.train.report(metrics, checkpoint=checkpoint)

    # What is left when the stage is done.

    def _export(self) -> None:
        from f2llm_ray.model.checkpoint import save_model

        module = self.engine.module
        state = _gathered(self.engine, module.backbone)
        if self.rank != 0:
            return
        with (self.job.out / "model").writing() as folder:
            save_model(folder, module.backbone, self.tokenizer, self._info(), state=state)
        self.job.out.write_json(
            "training.json",
            {
                "steps": self.steps,
                "tokens": self.tokens,
                "tokens_per_second": round(self.tokens / max(self.seconds, 1e-9), 1),
                "final_loss": self.losses[-1][1] if self.losses else None,
                "loss": self.losses,
                "validation": self.validation_losses,
            },
        )

    def _info(self) -> ModelInfo:
        from f2llm_ray.data.schema import query_text
        from f2llm_ray.model.checkpoint import matryoshka_dims

        stage = self.job.stage
        prompts = {
            name: query_text("", self.job.recipe.sources[name].query_instruction) if stage.instructions else ""
            for name in self.job.sources
        }
        return replace(
            self.info,
            name=f"{self.job.recipe.name}-{self.job.name}",
            dims=matryoshka_dims(self.engine.module.backbone.config.hidden_size, stage.matryoshka_min_dim),
            prompts={"query": prompts[self.job.sources[0]], **prompts},
            instructions=stage.instructions,
        )

    def _show(self, step: int, *, stall: float) -> None:
        if self.rank == 0:
            post(
                self.job.run_id,
                first=self.first,
                step=step,
                steps=self.steps,
                loss=self.losses[-1][1],
                tokens_per_second=self.tokens / max(self.seconds, 1e-9),
                stall=stall,
            )


class Teacher:
    """A frozen model whose vectors the student learns; run on the same texts in the same order."""

    def __init__(self, folder: Path, tokens_per_pass: int, device: str) -> None:
        from f2llm_ray.model.checkpoint import load_backbone

        self.backbone = load_backbone(folder).to(device).eval()
        self.tokens_per_pass = tokens_per_pass

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The teacher's vectors [n, D] of the batch's texts, before normalisation."""
        import torch

        from f2llm_ray.model.encoder import encode

        with torch.no_grad():
            return encode(self.backbone, batch.tokens, tokens_per_pass=self.tokens_per_pass).float()


def _first_step() -> int:
    """The step that the run's last checkpoint goes on from, 0 without one."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    return 0 if checkpoint is None else int(checkpoint.get_metadata()["step"])


@contextmanager
def _teacher(job: Job) -> Iterator[Teacher | None]:
    if job.teacher is None:
        yield None
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with job.teacher.as_local() as folder:
        yield Teacher(folder, job.stage.engine.tokens_per_pass, device)


def _encoder_module(backbone: PreTrainedModel, stage: TrainStage) -> torch.nn.Module:
    """The encoder as one module: the engine then sees one forward per step, however many passes it takes."""
    import torch

    from f2llm_ray.model.encoder import Tokens, encode

    class EncoderModule(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, tokens: list[Tokens]) -> torch.Tensor:
            return encode(self.backbone, tokens, tokens_per_pass=stage.engine.tokens_per_pass)

    return EncoderModule()


def _gathered(engine: DeepSpeedEngine, backbone: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The backbone's whole state in float32 on the CPU, also when ZeRO-3 keeps it in parts."""
    import deepspeed

    parameters = list(backbone.parameters())
    sharded = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(parameters, enabled=sharded):
        return {name: value.detach().float().cpu().clone() for name, value in backbone.state_dict().items()}
