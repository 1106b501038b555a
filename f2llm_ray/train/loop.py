"""The training loop of one worker: batches in, an exported model out, a checkpoint every so many steps."""

from __future__ import annotations

import math
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f2llm_ray.base.errors import F2LLMError, RunError
from f2llm_ray.data.batches.table import BatchTable
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder
from f2llm_ray.train import checkpoints
from f2llm_ray.train.board import post, tell
from f2llm_ray.train.deepspeed import learning_rate, set_learning_rate, start_engine
from f2llm_ray.train.displays import Displays
from f2llm_ray.train.loader import read, stream
from f2llm_ray.train.meters import HELD_OUT, Meters, Seen
from f2llm_ray.train.settings import TrainStage
from f2llm_ray.train.trackers import open_trackers

if TYPE_CHECKING:
    from f2llm_ray.train.objective import StageLoss

RAY_TRAIN = "ray_train"
"""Folder of Ray Train's run, and of the checkpoints, in the stage's."""
FAILURE = "failure.json"
BEST = {"loss": ("validation", 1), "score": ("score", -1)}
"""For each `best_by`, what a validation calls it, and the sign that makes less the better."""


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
                model=job.teacher, vectors=taught, tokens_per_pass=job.stage.engine.tokens_per_pass
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
        from f2llm_ray.data.tokens.tokenizer import load_tokenizer
        from f2llm_ray.model.checkpoint import load_backbone, load_info
        from f2llm_ray.model.vocabulary import load_map
        from f2llm_ray.train.objective import Student
        from f2llm_ray.train.throughput import Flops, peak_flops_per_second

        self.job, self.rank, self.world, self.loss = job, rank, world, loss
        self.store, self.taught = store, taught
        self.table = BatchTable(batches / "train", job.sources)
        self.validation = BatchTable(batches / "validation", job.sources)
        self.order = self.table.order()
        self.steps = -(-len(self.order) // job.stage.accumulate)
        peak = peak_flops_per_second(job.stage.engine.precision)
        self.meters = Meters(None if peak is None else peak * world)
        self.first = 0
        written = checkpoints.listed(job.out / RAY_TRAIN) if rank == 0 else []
        with checkpoints.opened(written, rank=rank, world=world, tell=self._tell) as opened:
            self.first = 0 if opened is None else opened.step
            # Begun before the model is loaded: Ray Data takes as long to start.
            self.batches = stream(
                self.table,
                store,
                first_step=self.first * job.stage.accumulate,
                rank=rank,
                world=world,
                prefetch=job.stage.engine.loader_prefetch,
                taught=taught,
            )
            self.info, self.tokenizer = load_info(student), load_tokenizer(student)
            backbone = load_backbone(student)
            self.flops = Flops(backbone)
            if job.stage.engine.gradient_checkpointing:
                backbone.gradient_checkpointing_enable()
            module = Student(backbone, job.stage.engine.tokens_per_pass, load_map(student), loss.projected_dims)
            self.engine = start_engine(module, job.stage, world)
            self.engine.train()
            if opened is not None:
                self._restore(opened)
        self.displays: Displays | None = None
        if rank == 0:
            trackers = open_trackers(job.recipe, job.name, job.stage, job.out, first=self.first, tell=self._tell)
            self.displays = Displays(job.name, trackers)

    def run(self) -> None:
        """Trains from where it is to the end, and exports the model."""
        for step in range(self.first, self.steps):
            self._step(step)
            self._show(step + 1)
            if (step + 1) % self.job.stage.checkpoint_every == 0 and step + 1 < self.steps:
                self._checkpoint(step + 1)
        self._validate(self.steps)
        exported = self._back_to_best() if self.job.stage.keep_best else self.steps
        self._export(exported)

    def _step(self, step: int) -> None:
        from f2llm_ray.train.step import train_step

        started = time.monotonic()
        rate = learning_rate(self.job.stage, step, self.steps)
        set_learning_rate(self.engine, rate)
        accumulate = self.job.stage.accumulate
        count = len(self.order[step * accumulate : (step + 1) * accumulate])
        done = train_step(self.engine, self.loss, self.batches, count, flops=self.flops, world=self.world)
        norm = done.values["gradient_norm"]
        if not (math.isfinite(done.values["loss"]) and math.isfinite(norm)):
            self._stop(step, done.batches, gradient_norm=norm, rate=rate)
        self.meters.record(step + 1, done.batches, {**done.values, "learning_rate": rate})
        self.meters.spent(seconds=time.monotonic() - started, waited=done.waited)

    def _stop(self, step: int, batches: list[Seen], *, gradient_norm: float, rate: float) -> None:
        """Writes down what was seen and ends the stage; all ranks see the same numbers and come here together."""
        import torch

        # The first batch whose loss is no number; where only the gradient is none, the one with the largest loss.
        losses = [batch.loss for batch in batches]
        broken = [place for place, loss in enumerate(losses) if not math.isfinite(loss)]
        place = broken[0] if broken else losses.index(max(losses))
        batch, entry = batches[place], self.order[step * self.job.stage.accumulate + place]
        where = f"epoch {int(entry['epoch'])}, batch {int(entry['batch'])} of source {batch.source!r}"
        if self.rank == 0:
            seen = {
                "stage": self.job.name,
                "step": step,
                "source": batch.source,
                "epoch": int(entry["epoch"]),
                "batch": int(entry["batch"]),
                # JSON has no name for what is no number.
                "loss": str(batch.loss),
                "gradient_norm": str(gradient_norm),
                "learning_rate": rate,
                "loss_before": self.meters.curves.get("loss", [])[-20:],
            }
            self.job.out.write_json(FAILURE, seen)
        if self.world > 1:
            torch.distributed.barrier()  # the first rank has written before any ends the group
        raise RunError(
            f"stage {self.job.name!r}, step {step}: the loss is {batch.loss} and the gradient's norm "
            f"{gradient_norm} on {where}; lower the learning rate, or look at that source. What was seen is in "
            f"{self.job.out.uri}/{FAILURE}, the last checkpoint stays"
        )

    def _validate(self, step: int) -> None:
        from f2llm_ray.train.validation import validate

        started = time.monotonic()
        batches = read(self.validation, self.store, rank=self.rank, world=self.world, taught=self.taught)
        found = validate(self.engine, self.loss, batches, self.world)
        self.meters.validation(step, found, time.monotonic() - started)
        if self.displays is not None:
            self.displays.show_held_out(step, self.meters)

    def _show(self, step: int) -> None:
        if self.displays is not None:
            self.displays.show(step, self.meters)
            post(self.job.run_id, first=self.first, step=step, steps=self.steps, line=self.meters.line())

    def _tell(self, line: str) -> None:
        tell(self.job.run_id, line)

    # Checkpoints.

    def _checkpoint(self, step: int) -> None:
        import ray.train

        self._validate(step)
        folder = Path(tempfile.mkdtemp(prefix="f2llm-"))
        checkpoints.save(
            self.engine,
            folder,
            rank=self.rank,
            world=self.world,
            step=step,
            history={"meters": self.meters.state()},
        )
        # The upload goes on beside the next steps; Ray Train removes the local folder after it, registers
        # checkpoints in order, and ends the worker only when all are there.
        ray.train.report(
            {"step": step, **{name: self.meters.last_held_out(name) for name in HELD_OUT}},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )

    def _restore(self, opened: checkpoints.Opened) -> None:
        checkpoints.restore(self.engine, opened, rank=self.rank, world=self.world)
        self.meters.load(opened.checkpoint.history["meters"])

    def _back_to_best(self) -> int:
        """Puts the best checkpoint back, unless the last step is as good."""
        import ray.train

        ray.train.get_all_reported_checkpoints()  # waits for uploads
        name, sign = BEST[self.job.stage.best_by]
        last = self.meters.last_held_out(name)
        if last is None:
            return self.steps
        written = checkpoints.listed(self.job.out / RAY_TRAIN)
        scored = [(sign * c.history["meters"]["held_out"][name][-1][1], c) for c in written]
        best_first = [c for value, c in sorted(scored, key=lambda pair: pair[0]) if value < sign * last]
        with checkpoints.opened(best_first, rank=self.rank, world=self.world, tell=self._tell) as opened:
            if opened is None:
                return self.steps
            checkpoints.restore(self.engine, opened, rank=self.rank, world=self.world)
            return opened.step

    def _export(self, step: int) -> None:
        from f2llm_ray.train.model_folder import export, trained_info

        hidden = self.engine.module.backbone.config.hidden_size
        export(
            self.engine,
            self.job.out,
            tokenizer=self.tokenizer,
            info=trained_info(self.info, self.job.recipe, self.job.name, self.job.stage, self.job.sources, hidden),
            token_map=self.engine.module.tokens,
            training={
                "steps": self.steps,
                "exported_step": step,
                "workers": self.world,
                **self.meters.summary(),
            },
            rank=self.rank,
        )
        if self.displays is not None:
            self.displays.close()
