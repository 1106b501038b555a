"""The training loop of one worker: batches in, an exported model out, a checkpoint every so many steps."""

from __future__ import annotations

import math
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f2llm_ray.base import formatting
from f2llm_ray.base.errors import F2LLMError, RunError
from f2llm_ray.data.batches.table import BatchTable
from f2llm_ray.train import checkpoints
from f2llm_ray.train.deepspeed import learning_rate, set_learning_rate, start_engine
from f2llm_ray.train.loader import read, stream
from f2llm_ray.train.meters import HELD_OUT, TrainingMeters
from f2llm_ray.train.pace import PACE_FILE, WARM, Pace
from f2llm_ray.train.trackers import SOURCE_LOSS, Tracker, open_trackers
from f2llm_ray.train.training import TrainJob
from f2llm_ray.train.watch import report

if TYPE_CHECKING:
    from f2llm_ray.train.objective import StageLoss
    from f2llm_ray.train.step import Seen

FAILURE = "failure.json"
BEST = {"loss": ("validation", 1), "score": ("score", -1)}
"""For each `best_by`, the name of its curve, and a sign: times that, a lower value is a better one."""


def work(config: dict[str, Any]) -> None:
    """The function Ray Train runs on every worker."""
    import ray
    import ray.train
    import torch

    from f2llm_ray.model.checkpoint import load_info
    from f2llm_ray.train.objective import StageLoss
    from f2llm_ray.train.teacher import teacher_of

    job: TrainJob = config["job"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    training = job.training
    torch.set_num_threads(training.compute.threads_per_worker)
    torch.manual_seed(training.seed)
    try:
        with (
            job.student.as_local() as student,
            job.tokens.as_local() as store,
            job.batches.as_local() as batches,
            nullcontext() if job.taught is None else job.taught.as_local() as taught,
        ):
            budget = training.settings.engine.tokens_per_pass
            teacher = teacher_of(model=job.teacher, vectors=taught, tokens_per_pass=budget)
            hidden = (training.ends or load_info(student).dims)[-1]
            loss = StageLoss(training.settings, training.sources, hidden, teacher, training.ends)
            worker = Worker(
                job, rank, world, student=student, store=store, batches=batches, taught=taught, loss=loss
            )
            if job.timed_seconds is None:
                worker.run()
            else:
                worker.time(job.timed_seconds)
    except F2LLMError:
        raise  # the trainer stops, and the driver shows it
    except Exception as error:
        # Ray Train tries again from the last checkpoint: the driver must not wait through that in silence.
        ray.get(report(job, f"worker {rank} failed: {type(error).__name__}: {error}"))
        raise


class Worker:
    """One rank's engine, batches and position in the stage."""

    def __init__(
        self,
        job: TrainJob,
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
        from f2llm_ray.model.dense import end_in
        from f2llm_ray.model.vocabulary import load_map
        from f2llm_ray.run.folder import Folder
        from f2llm_ray.train.lora import add_adapters
        from f2llm_ray.train.objective import Student
        from f2llm_ray.train.teacher_store import TeacherStore
        from f2llm_ray.train.throughput import Flops, peak_flops_per_second

        self.job, self.rank, self.world, self.loss = job, rank, world, loss
        self.student, self.store, self.taught = student, store, taught
        self.settings = settings = job.training.settings
        sources = tuple(job.training.sources)
        self.table = BatchTable(batches / "train", sources)
        self.validation = BatchTable(batches / "validation", sources)
        self.order = self.table.order()
        self.steps = -(-len(self.order) // settings.accumulate)
        peak = peak_flops_per_second(settings.engine.precision)
        self.meters = TrainingMeters(None if peak is None else peak * world)
        self.first = 0
        self._tell("workers read the model")
        written = checkpoints.listed(job.checkpoints) if rank == 0 else []
        with checkpoints.opened(written, rank=rank, world=world, say=self._say) as opened:
            self.first = 0 if opened is None else opened.step
            # Started before the model is loaded: Ray Data takes as long to start.
            self.batches = stream(
                self.table,
                store,
                first_step=self.first * settings.accumulate,
                rank=rank,
                world=world,
                prefetch=settings.engine.loader_prefetch,
                taught=taught,
            )
            self.info, self.tokenizer = load_info(student), load_tokenizer(student)
            backbone = load_backbone(student)
            if job.training.ends is not None:
                place = f"stage {job.training.stage!r}: space: teacher"
                end_in(
                    backbone, job.training.ends[-1], place, None if taught is None else TeacherStore(taught).mean()
                )
            if settings.lora is not None:
                add_adapters(backbone, settings.lora, job.training.seed, f"stage {job.training.stage!r}")
            self.flops = Flops(backbone)
            if settings.engine.gradient_checkpointing:
                backbone.gradient_checkpointing_enable()
            module = Student(
                backbone,
                self.info.pooling,
                settings.engine.tokens_per_pass,
                load_map(Folder.at(str(student))),
                loss.projected_dims,
                settings.exits,
            )
            self.engine = start_engine(module, settings, world)
            self.engine.train()
            if opened is not None:
                checkpoints.restore(self.engine, opened, rank=rank, world=world)
                self.meters.load(opened.history["meters"])
        self.trackers = list[Tracker]()
        if rank == 0 and job.timed_seconds is None:
            self.trackers = open_trackers(job.training, job.out, first=self.first, say=self._say)

    def run(self) -> None:
        """Trains from where it is to the end, and exports the model."""
        self._tell(f"ready, {formatting.plural(self.steps - self.first, 'step')} to go")
        for step in range(self.first, self.steps):
            self._step(step)
            if (step + 1) % self.settings.checkpoint_every == 0 and step + 1 < self.steps:
                self._checkpoint(step + 1)
        self._validate(self.steps)
        self._tell("writes the model, and stores its last checkpoints")
        exported = self._back_to_best() if self.settings.keep_best else self.steps
        self._export(exported)

    def time(self, seconds: float) -> None:
        """Times steps and a validation and writes `PACE_FILE`; after so many timed seconds, no further step."""
        import torch

        from f2llm_ray.train.objective import mean_over_ranks

        def all_ranks(own: float) -> float:
            # Every rank must go on or stop with the others, and their clocks differ.
            return mean_over_ranks(
                torch.tensor([own], dtype=torch.float64, device=self.engine.device), self.world
            )[0]

        self._tell(f"times up to {formatting.plural(self.steps, 'step')}, and a validation")
        timed = list[float]()
        for step in range(self.steps):
            took = all_ranks(self._step(step))
            timed += [took] if step >= WARM else []
            if sum(timed) > seconds:
                break
        if not timed:  # fewer steps than are warmed up with
            timed = [took]
        self._validate(step + 1)
        pace = Pace(sum(timed) / len(timed), all_ranks(self.meters.validated))
        if self.rank == 0:
            self.job.out.write_json(PACE_FILE, {**asdict(pace), "timed_steps": len(timed), "workers": self.world})

    def _step(self, step: int) -> float:
        """One step; returns its seconds."""
        from f2llm_ray.train.step import train_step

        started = time.monotonic()
        rate = learning_rate(self.settings, step, self.steps)
        set_learning_rate(self.engine, rate)
        accumulate = self.settings.accumulate
        count = len(self.order[step * accumulate : (step + 1) * accumulate])
        done = train_step(self.engine, self.loss, self.batches, count, flops=self.flops, world=self.world)
        norm = done.values["gradient_norm"]
        if not (math.isfinite(done.values["loss"]) and math.isfinite(norm)):
            self._stop(step, done.batches, gradient_norm=norm, rate=rate)
        seconds = time.monotonic() - started
        self.meters.record(step + 1, done, rate=rate, seconds=seconds)
        if self.rank == 0 and self.job.timed_seconds is None:
            losses = self.meters.running["source_loss"]
            of_sources = {f"{SOURCE_LOSS}{batch.source}": losses[batch.source] for batch in done.batches}
            self._log(step + 1, {**self.meters.last, **of_sources, **self.meters.rates()})
            now = {"first": self.first, "step": step + 1, "steps": self.steps, "line": self.meters.line()}
            report(self.job, now)
        return seconds

    def _stop(self, step: int, batches: list[Seen], *, gradient_norm: float, rate: float) -> None:
        """Writes the step's values to `FAILURE` and ends the stage; all ranks have the same ones and call it."""
        import torch

        # The first batch whose loss is NaN or infinite; where only the gradient is, the one with the largest loss.
        losses = [batch.loss for batch in batches]
        broken = [place for place, loss in enumerate(losses) if not math.isfinite(loss)]
        place = broken[0] if broken else losses.index(max(losses))
        batch, entry = batches[place], self.order[step * self.settings.accumulate + place]
        where = f"epoch {int(entry['epoch'])}, batch {int(entry['batch'])} of source {batch.source!r}"
        if self.rank == 0:
            seen = {
                "stage": self.job.training.stage,
                "step": step,
                "source": batch.source,
                "epoch": int(entry["epoch"]),
                "batch": int(entry["batch"]),
                # JSON has neither NaN nor infinity.
                "loss": str(batch.loss),
                "gradient_norm": str(gradient_norm),
                "learning_rate": rate,
                "loss_before": self.meters.curves.get("loss", [])[-20:],
            }
            self.job.out.write_json(FAILURE, seen)
        if self.world > 1:
            torch.distributed.barrier()  # the first rank has written before any ends the group
        raise RunError(
            f"stage {self.job.training.stage!r}, step {step}: the loss is {batch.loss} and the gradient's norm "
            f"{gradient_norm} on {where}; lower the learning rate, or look at that source. The step's values "
            f"are in {self.job.out.uri}/{FAILURE}, the last checkpoint stays"
        )

    def _validate(self, step: int) -> None:
        from f2llm_ray.train.validation import validate

        started = time.monotonic()
        batches = read(self.validation, self.store, rank=self.rank, world=self.world, taught=self.taught)
        found = validate(self.engine, self.loss, batches, self.world)
        self.meters.validation(step, found, time.monotonic() - started)
        held_out = self.meters.held_out().items()
        self._log(step, {HELD_OUT[name]: value for name, value in held_out if value is not None})

    def _log(self, step: int, values: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(values, step)

    def _tell(self, line: str) -> None:
        """Prints a line of what the first worker begins, without waiting until it is printed."""
        if self.rank == 0:
            report(self.job, line)

    def _say(self, line: str) -> None:
        import ray

        ray.get(report(self.job, line))

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
            {"step": step, **self.meters.held_out()},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )

    def _back_to_best(self) -> int:
        """Puts the best checkpoint back, unless the last step is as good."""
        import ray.train

        ray.train.get_all_reported_checkpoints()  # waits for uploads
        name, sign = BEST[self.settings.best_by]
        last = self.meters.held_out()[name]
        if last is None:
            return self.steps
        written = checkpoints.listed(self.job.checkpoints)
        scored = [(sign * c.history["meters"]["curves"][name][-1][1], c) for c in written]
        best_first = [c for value, c in sorted(scored, key=lambda pair: pair[0]) if value < sign * last]
        with checkpoints.opened(best_first, rank=self.rank, world=self.world, say=self._say) as opened:
            if opened is None:
                return self.steps
            checkpoints.restore(self.engine, opened, rank=self.rank, world=self.world)
            return opened.step

    def _export(self, step: int) -> None:
        from f2llm_ray.train.model_folder import export, export_adapted, trained_info

        training, lora = self.job.training, self.settings.lora
        info, rank = trained_info(self.info, training), self.rank
        facts = {"steps": self.steps, "exported_step": step, "workers": self.world, **self.meters.summary()}
        if lora is None:
            export(
                self.engine,
                self.job.out,
                tokenizer=self.tokenizer,
                info=info,
                token_map=self.engine.module.tokens,
                training=facts,
                rank=rank,
            )
        else:
            export_adapted(
                self.engine,
                self.job.out,
                student=self.student,
                lora=lora,
                info=info,
                ends=training.ends,
                training=facts,
                rank=rank,
            )
        for tracker in self.trackers:
            tracker.close()
