"""Checkpoints measured on the recipe's sets while training goes on, by tasks on what the cluster has to spare.

No step waits for it: a task begins when there is a free CPU or GPU, at the latest when training is over.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f2llm_ray.base.errors import RunError, plain_error
from f2llm_ray.base.progress import say
from f2llm_ray.run.folder import Folder
from f2llm_ray.train import checkpoints
from f2llm_ray.train.checkpoints import Checkpoint

if TYPE_CHECKING:
    from f2llm_ray.model.checkpoint import ModelInfo
    from f2llm_ray.train.loop import Job

SCORES_FILE = "checkpoint_scores.json"
SECONDS = 2.0
"""Between looks at what checkpoints there are."""

Scores = dict[str, float]
"""The main metric at the full dim, by metric and set."""


@contextmanager
def followed(job: Job, folder: Folder, sets: Folder) -> Iterator[None]:
    """Measures each checkpoint that appears for as long as the context lasts, and waits for the last ones.

    `SCORES_FILE` in the stage's folder has the scores by step, also those of an earlier try. A checkpoint that
    was gone before there was room for it, or cannot be measured, is told.

    Args:
        job: the stage.
        folder: where its checkpoints appear.
        sets: where the data steps wrote the recipe's sets.
    """
    stop = threading.Event()
    follower = _Follower(job, folder, sets)

    def follow() -> None:
        while not stop.wait(SECONDS):
            follower.look()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        stop.set()
        thread.join()
        follower.cancel()
        raise
    stop.set()
    thread.join()
    follower.finish()


def curves(out: Folder) -> dict[str, list[tuple[int, float]]]:
    """What `SCORES_FILE` holds as curves (step, score) by metric and set."""
    if not out.exists(SCORES_FILE):
        return {}
    found: dict[str, list[tuple[int, float]]] = {}
    for step, scores in sorted(out.read_json(SCORES_FILE).items(), key=lambda item: int(item[0])):
        for name, score in scores.items():
            found.setdefault(name, []).append((int(step), score))
    return found


class _Follower:
    def __init__(self, job: Job, folder: Folder, sets: Folder) -> None:
        import ray

        self.job, self.folder, self.sets = job, folder, sets
        gpus = 1 if job.recipe.compute.gpus_per_worker else 0
        self.task = ray.remote(num_cpus=1, num_gpus=gpus)(_score)
        self.scores: dict[str, Scores] = job.out.read_json(SCORES_FILE) if job.out.exists(SCORES_FILE) else {}
        self.begun = {int(step) for step in self.scores}
        self.pending: dict[Any, int] = {}

    def look(self) -> None:
        """Begins a task for each new checkpoint, and takes what is done."""
        import ray

        for checkpoint in reversed(checkpoints.listed(self.folder)):
            if checkpoint.step not in self.begun:
                self.begun.add(checkpoint.step)
                work = self.task.remote(self.job, checkpoint, self.sets)
                self.pending[work] = checkpoint.step
        if self.pending:
            done, _ = ray.wait(list(self.pending), num_returns=len(self.pending), timeout=0)
            self._take(done)

    def finish(self) -> None:
        """Waits for all that has begun."""
        self.look()
        if self.pending:
            say(f"{self.job.name}: measures the checkpoints of steps {sorted(self.pending.values())}")
            self._take(list(self.pending))

    def cancel(self) -> None:
        """Ends what has begun."""
        import ray

        for work in self.pending:
            ray.cancel(work, force=True)

    def _take(self, done: list[Any]) -> None:
        import ray
        from ray.exceptions import RayError

        for work in done:
            step = self.pending.pop(work)
            try:
                scores: Scores = ray.get(work)
            except RayError as error:
                reason = plain_error(error) or str(error).splitlines()[-1]
                say(f"{self.job.name}: the checkpoint of step {step:,} is not measured: {reason}")
                continue
            self.scores[str(step)] = scores
            self.job.out.write_json(SCORES_FILE, self.scores)
            told = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
            say(f"{self.job.name}: step {step:,}: {told}")


def _score(job: Job, checkpoint: Checkpoint, sets: Folder) -> Scores:
    """Measures one checkpoint, inside a Ray task."""
    import torch

    from f2llm_ray.engine.engine import Engine
    from f2llm_ray.evaluate.measure import measure

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="f2llm-") as folder:
        write_model(job, checkpoint, Path(folder))
        engine = Engine(Path(folder))
        results = measure(engine, sets, job.recipe)
    full = str(engine.info.dims[-1])
    metrics = {name: found["metric"] for name, found in results.items()}
    return {f"{metrics[name]} on {name}": found["scores"][full][metrics[name]] for name, found in results.items()}


def write_model(job: Job, checkpoint: Checkpoint, folder: Path) -> ModelInfo:
    """Writes the model that a stage would export at a checkpoint.

    Raises:
        RunError: the checkpoint is gone, as Ray Train keeps only the last or the best, or damaged.
    """
    from f2llm_ray.data.tokens.tokenizer import load_tokenizer
    from f2llm_ray.model.checkpoint import load_backbone, load_info, save_model
    from f2llm_ray.model.vocabulary import load_map, save_map
    from f2llm_ray.train.model_folder import trained_info

    if not checkpoint.folder.exists():
        raise RunError(f"it was gone before there was room to measure it; raise keep_checkpoints of {job.name!r}")
    with job.student.as_local() as path:
        backbone, before = load_backbone(path), load_info(path)
        tokenizer, table = load_tokenizer(path), load_map(path)
    with checkpoints.weights(checkpoint) as read:
        state = {key: read(f"backbone.{key}") for key in backbone.state_dict()}
    info = trained_info(before, job.recipe, job.name, job.stage, job.sources, backbone.config.hidden_size)
    save_model(folder, backbone, tokenizer, info, state=state)
    if table is not None:
        save_map(table, folder)
    return info
