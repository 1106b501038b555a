"""The training loop of one worker: batches in, an exported model out, a checkpoint every so many steps."""

from __future__ import annotations

import math
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f2llm_ray.data.batches import BatchTable
from f2llm_ray.errors import F2LLMError, RunError
from f2llm_ray.recipe import Recipe
from f2llm_ray.run import Folder
from f2llm_ray.train import checkpoints
from f2llm_ray.train.board import post, tell
from f2llm_ray.train.loader import Batch, read, stream
from f2llm_ray.train.meters import Displays, Meters
from f2llm_ray.train.settings import TrainStage
from f2llm_ray.train.zero import learning_rate, set_learning_rate, start_engine
from f2llm_ray.train.zero import step as optimizer_step

if TYPE_CHECKING:
    from f2llm_ray.train.objective import StageLoss

RAY_TRAIN = "ray_train"
"""Folder of Ray Train's run, and of the checkpoints, in the stage's."""
FAILURE = "failure.json"


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
    """The model folder of a teacher that runs beside it."""
    taught: Folder | None
    """The store of a cached teacher's vectors."""
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

    from f2llm_ray.model.checkpoint import load_info
    from f2llm_ray.train.objective import StageLoss
    from f2llm_ray.train.teacher import teacher_of

    job: Job = config["job"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(job.recipe.compute.threads_per_worker)
    torch.manual_seed(job.recipe.seed)
    try:
        with (
            job.student.as_local() as student,
            job.tokens.as_local() as store,
            job.batches.as_local() as batches,
            nullcontext() if job.taught is None else job.taught.as_local() as taught,
        ):
            teacher = teacher_of(
                job.recipe, model=job.teacher, vectors=taught, tokens_per_pass=job.stage.engine.tokens_per_pass
            )
            loss = StageLoss(job.recipe, job.stage, load_info(student).dims[-1], teacher)
            Worker(job, rank, world, student=student, store=store, batches=batches, taught=taught, loss=loss).run()
    except F2LLMError:
        raise  # the trainer stops and tells it
    except Exception as error:
        # Ray Train tries again from the last checkpoint: the driver must not wait through that in silence.
        tell(job.run_id, f"worker {rank} failed: {type(error).__name__}: {error}")
        raise


class Worker:
    """One rank's engine, batches and position in the stage."""

    def __init__(
        self,
        job: Job,
        rank: int,
        world: int,
        *,
        student: Path,
        store: Path,
        batches: Path,
        taught: Path | None,
        loss: StageLoss,
    ) -> None:
        from f2llm_ray.model.checkpoint import load_backbone, load_info, load_tokenizer
        from f2llm_ray.model.vocabulary import load_map
        from f2llm_ray.train.objective import Student

        self.job, self.rank, self.world, self.loss = job, rank, world, loss
        self.store, self.taught = store, taught
        self.table = BatchTable(batches / "train", job.sources)
        self.validation = BatchTable(batches / "validation", job.sources)
        self.order = self.table.order()
        self.steps = len(self.order)
        self.meters = Meters()
        self.validation_losses: list[tuple[int, float]] = []
        self.first = 0
        written = checkpoints.listed(job.out / RAY_TRAIN) if rank == 0 else []
        with checkpoints.opened(written, rank=rank, world=world, tell=self._tell) as opened:
            self.first = 0 if opened is None else opened.step
            # Begun before the model is loaded: Ray Data takes as long to start.
            self.batches = stream(
                self.table,
                store,
                first_step=self.first,
                rank=rank,
                world=world,
                prefetch=job.stage.engine.loader_prefetch,
                taught=taught,
            )
            self.info, self.tokenizer = load_info(student), load_tokenizer(student)
            backbone = load_backbone(student)
            if job.stage.engine.gradient_checkpointing:
                backbone.gradient_checkpointing_enable()
            module = Student(backbone, job.stage.engine.tokens_per_pass, load_map(student), loss.projected_dims)
            self.engine = start_engine(module, job.stage, world)
            self.engine.train()
            if opened is not None:
                self._restore(opened)
        local = job.out.local
        self.displays = Displays(job.name, local and local / "tensorboard", self.first) if rank == 0 else None

    def run(self) -> None:
        """Trains from where it is to the end, and exports the model."""
        for step in range(self.first, self.steps):
            asked = time.monotonic()
            batch = next(self.batches)
            waited = time.monotonic() - asked
            self._step(step, batch)
            self.meters.spent(seconds=time.monotonic() - asked, waited=waited)
            self._show(step + 1, batch)
            if (step + 1) % self.job.stage.checkpoint_every == 0 and step + 1 < self.steps:
                self._checkpoint(step + 1)
        self._validate(self.steps)
        exported = self._back_to_best() if self.job.stage.keep_best else self.steps
        self._export(exported)

    def _step(self, step: int, batch: Batch) -> None:
        import torch

        from f2llm_ray.train.cache import cached_backward, engine_backward
        from f2llm_ray.train.objective import chunks_of, encoder_of, mean_over_ranks

        rate = learning_rate(self.job.stage, step, self.steps)
        set_learning_rate(self.engine, rate)
        loss, parts = cached_backward(
            encoder_of(self.engine, batch),
            chunks_of(self.engine, self.job.stage, batch),
            lambda v_nd: self.loss(v_nd, batch),
            engine_backward(self.engine),
        )
        norm = optimizer_step(self.engine)
        own = sum(len(text) for text in batch.tokens)
        named = dict(zip([f"loss_at_{dim}" for dim in self._dims()], parts.total_m, strict=True))
        named |= {f"teacher_{name}": term for name, term in parts.distillation.items()}
        seen = torch.stack([loss, loss.new_tensor(own), *named.values()]).double()
        mean, tokens, *values = mean_over_ranks(seen, self.world)
        if not (math.isfinite(mean) and math.isfinite(norm)):
            self._stop(step, batch, loss=mean, gradient_norm=norm, rate=rate)
        self.meters.record(
            step + 1,
            source=batch.source,
            task=self.job.recipe.sources[batch.source].task,
            tokens=round(tokens * self.world),
            values={
                "loss": mean,
                "gradient_norm": norm,
                "learning_rate": rate,
                **dict(zip(named, values, strict=True)),
            },
        )

    def _dims(self) -> list[int]:
        """The matryoshka dims, largest first, as the parts of a loss have them."""
        from f2llm_ray.model.checkpoint import matryoshka_dims

        hidden = self.engine.module.backbone.config.hidden_size
        return sorted(matryoshka_dims(hidden, self.job.stage.matryoshka_min_dim), reverse=True)

    def _stop(self, step: int, batch: Batch, *, loss: float, gradient_norm: float, rate: float) -> None:
        """Writes down what was seen and ends the stage; all ranks see the same numbers and come here together."""
        import torch

        entry = self.order[step]
        place = f"epoch {int(entry['epoch'])}, batch {int(entry['batch'])} of source {batch.source!r}"
        if self.rank == 0:
            seen = {
                "stage": self.job.name,
                "step": step,
                "source": batch.source,
                "epoch": int(entry["epoch"]),
                "batch": int(entry["batch"]),
                # JSON has no name for what is no number.
                "loss": str(loss),
                "gradient_norm": str(gradient_norm),
                "learning_rate": rate,
                "loss_before": self.meters.curves.get("loss", [])[-20:],
            }
            self.job.out.write_json(FAILURE, seen)
        if self.world > 1:
            torch.distributed.barrier()  # the first rank has written before any ends the group
        raise RunError(
            f"stage {self.job.name!r}, step {step}: the loss is {loss} and the gradient's norm {gradient_norm} on "
            f"{place}; lower the learning rate, or look at that source. What was seen is in "
            f"{self.job.out.uri}/{FAILURE}, the last checkpoint stays"
        )

    def _validate(self, step: int) -> None:
        from f2llm_ray.train.objective import validate

        batches = read(self.validation, self.store, rank=self.rank, world=self.world, taught=self.taught)
        loss = validate(self.engine, self.loss, batches, self.world)
        if loss is not None:
            self.validation_losses.append((step, round(loss, 6)))

    def _show(self, step: int, batch: Batch) -> None:
        if self.displays is not None:
            self.displays.show(step, batch.source, self.meters)
            post(self.job.run_id, first=self.first, step=step, steps=self.steps, line=self.meters.line())

    def _tell(self, line: str) -> None:
        tell(self.job.run_id, line)

    # Checkpoints.

    def _checkpoint(self, step: int) -> None:
        import ray.train

        self._validate(step)
        folder = Path(tempfile.mkdtemp(prefix="f2llm-"))
        checkpoints.save(self.engine, folder, rank=self.rank, world=self.world, step=step, history=self._history())
        # The upload goes on beside the next steps; Ray Train removes the local folder after it, registers
        # checkpoints in order, and ends the worker only when all are there.
        ray.train.report(
            {"step": step, "validation_loss": self._last_validation()},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )

    def _history(self) -> checkpoints.History:
        return {"meters": self.meters.state(), "validation": self.validation_losses}

    def _last_validation(self) -> float | None:
        return self.validation_losses[-1][1] if self.validation_losses else None

    def _restore(self, opened: checkpoints.Opened) -> None:
        checkpoints.restore(self.engine, opened, rank=self.rank, world=self.world)
        history = opened.checkpoint.history
        self.meters.load(history["meters"])
        self.validation_losses = [(step, loss) for step, loss in history["validation"]]

    def _back_to_best(self) -> int:
        """Puts the checkpoint with the lowest validation loss back, unless the last step is as good."""
        import ray.train

        ray.train.get_all_reported_checkpoints()  # waits for uploads
        last = self._last_validation()
        if last is None:
            return self.steps
        scored = [(c.history["validation"][-1][1], c) for c in checkpoints.listed(self.job.out / RAY_TRAIN)]
        best_first = [c for loss, c in sorted(scored, key=lambda pair: pair[0]) if loss < last]
        with checkpoints.opened(best_first, rank=self.rank, world=self.world, tell=self._tell) as opened:
            if opened is None:
                return self.steps
            checkpoints.restore(self.engine, opened, rank=self.rank, world=self.world)
            return opened.step

    def _export(self, step: int) -> None:
        from f2llm_ray.train.export import export, trained_info

        hidden = self.engine.module.backbone.config.hidden_size
        export(
            self.engine,
            self.job.out,
            tokenizer=self.tokenizer,
            info=trained_info(self.info, self.job.recipe, self.job.name, self.job.stage, self.job.sources, hidden),
            training={
                "steps": self.steps,
                "exported_step": step,
                "workers": self.world,
                **self.meters.summary(),
                "validation": self.validation_losses,
            },
            rank=self.rank,
        )
        if self.displays is not None:
            self.displays.close()
