"""Watching a training from the driver: the reports of its workers, and its checkpoints measured beside it.

Workers report through a queue that the driver empties. A checkpoint is measured on the evaluation sets by a
task on a CPU or GPU that training leaves free, at the latest when training is over: no step waits for it.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from f2llm_ray.base.errors import RunError, plain_error
from f2llm_ray.base.progress import Progress, say
from f2llm_ray.train import checkpoints
from f2llm_ray.train.training import TrainJob

SCORES_FILE = "checkpoint_scores.json"
"""In the stage's folder: curves of [step, main metric at the full dims] by metric and set."""
SECONDS = 2.0
"""Between two looks at the queue and the checkpoints."""
NAMESPACE = "f2llm"


def report(job: TrainJob, event: str | dict[str, Any]) -> Any:
    """Sends the driver a line to print, or the progress as a dict of first, step, steps and line (its facts).

    A worker that ends next must wait for the reference that this returns.
    """
    import ray

    return ray.get_actor(job.queue, namespace=NAMESPACE).put_nowait.remote(event)


@contextmanager
def watched(job: TrainJob) -> Iterator[None]:
    """Prints a training's progress and measures its checkpoints for as long as the context lasts.

    Without an error inside, the end waits for the last checkpoints. One that was deleted before there was room for
    its task, or that cannot be measured, is reported in a line.
    """
    import ray

    watch, stop = _Watch(job), threading.Event()

    def follow() -> None:
        while not stop.wait(SECONDS):
            with suppress(OSError):  # of a store that does not answer: the next look tries again
                watch.look()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        try:
            yield
        finally:
            stop.set()
            thread.join()
        watch.look()
        if watch.pending:
            say(f"{watch.label}: measures the checkpoints of steps {sorted(watch.pending.values())}")
        watch.collect(list(watch.pending))
    finally:
        watch.print_reports()
        for task in watch.pending:
            ray.cancel(task, force=True)
        watch.queue.shutdown(force=True)  # it is empty, and its own way to end may take seconds


class _Watch:
    def __init__(self, job: TrainJob) -> None:
        import ray
        from ray.util.queue import Queue

        self.job, self.label = job, job.label
        actor = {"name": job.queue, "namespace": NAMESPACE, "get_if_exists": True, "num_cpus": 0}
        self.queue = Queue(actor_options=actor)
        self.progress: Progress | None = None
        self.first, self.line = 0, ""
        gpus = 1 if job.training.compute.gpus_per_worker else 0
        self.measure = ray.remote(num_cpus=1, num_gpus=gpus)(_measure)
        self.curves: dict[str, Any] = job.out.read_json(SCORES_FILE) if job.out.exists(SCORES_FILE) else {}
        self.begun = {step for curve in self.curves.values() for step, _ in curve}
        self.pending: dict[Any, int] = {}

    def look(self) -> None:
        """Prints reports, starts a task for each new checkpoint, and collects the results of finished ones."""
        import ray

        self.print_reports()
        for checkpoint in reversed(checkpoints.listed(self.job.checkpoints)) if self.job.training.sets else ():
            if checkpoint.step not in self.begun:
                self.begun.add(checkpoint.step)
                self.pending[self.measure.remote(self.job, checkpoint)] = checkpoint.step
        if self.pending:
            self.collect(ray.wait(list(self.pending), num_returns=len(self.pending), timeout=0)[0])

    def print_reports(self) -> None:
        """Prints new lines, and the progress when it is time to."""
        for event in self.queue.get_nowait_batch(self.queue.qsize()):
            if isinstance(event, str):
                if event != self.line:  # as several workers, or tries, report the same
                    say(f"{self.label}: {event}")
                self.line = event
                continue
            if self.progress is None or self.first != event["first"]:
                self.first, self.progress = event["first"], Progress(self.label, event["steps"], "steps")
                if self.first:
                    say(f"{self.label}: goes on from step {self.first:,}")
            self.progress.update(event["step"], *event["line"])

    def collect(self, tasks: list[Any]) -> None:
        """Waits for tasks, and adds their scores to the curves."""
        import ray

        for task in tasks:
            step = self.pending.pop(task)
            try:
                scores: dict[str, float] = ray.get(task)
            except ray.exceptions.RayError as error:
                reason = plain_error(error) or str(error).splitlines()[-1]
                say(f"{self.label}: the checkpoint of step {step:,} is not measured: {reason}")
                continue
            for name, score in scores.items():
                self.curves[name] = sorted([*self.curves.get(name, []), [step, score]])
            self.job.out.write_json(SCORES_FILE, self.curves)
            shown = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
            say(f"{self.label}: step {step:,}: {shown}")


def _measure(job: TrainJob, checkpoint: checkpoints.Checkpoint) -> dict[str, float]:
    """Measures the model that the stage would export at a checkpoint, inside a Ray task."""
    import torch

    from f2llm_ray.engine.engine import Engine
    from f2llm_ray.evaluate.measure import measure
    from f2llm_ray.model.checkpoint import load_info
    from f2llm_ray.train.model_folder import trained_info, write_reweighted

    torch.set_num_threads(1)
    if not checkpoint.folder.exists():  # Ray Train keeps only the last or the best
        stage = job.training.stage
        raise RunError(f"it was gone before there was room to measure it; raise keep_checkpoints of {stage!r}")
    with (
        tempfile.TemporaryDirectory(prefix="f2llm-") as copy,
        job.student.as_local() as student,
        checkpoints.weights(checkpoint, job.training.settings.lora) as read,
    ):
        info = trained_info(load_info(student), job.training)
        write_reweighted(student, Path(copy), info, read, ends=job.training.ends)
        results = measure(Engine(Path(copy)), job.training.sets, job.training.divisors)
    full = str(info.dims[-1])
    metrics = {name: found["metric"] for name, found in results.items()}
    return {f"{metrics[name]} on {name}": found["scores"][full][metrics[name]] for name, found in results.items()}
