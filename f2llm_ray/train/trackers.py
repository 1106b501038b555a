"""Trackers: where the values of a training are shown: Ray's metrics, TensorBoard, MLflow and Weights & Biases.

Each writes in the background, so that a slow server does not slow the steps down. A training that was cut off
continues in the same TensorBoard folder, MLflow run or W&B run. Keys and passwords come from the environment
variables that these libraries read themselves; a recipe holds none.
"""

from __future__ import annotations

import hashlib
import importlib.util
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from f2llm_ray.base.errors import RunError
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.settings import Mlflow, Wandb
from f2llm_ray.train.training import Training

GAUGES = {
    "loss": "Running loss of a source",
    "validation_loss": "Loss on held-out rows at the last checkpoint",
    "validation_ndcg10": "nDCG@10 on held-out retrieval rows at the last checkpoint",
    "step": "Optimizer steps done",
    "tokens_per_second": "Real tokens per second of all workers",
    "gradient_norm": "Norm of the gradient before clipping",
    "learning_rate": "Learning rate",
    "loader_stall": "Share of the time spent waiting for the loader",
    "padding_share": "Share of the computed positions that was padding",
    "mfu": "Model FLOPs utilisation of the GPUs",
}
"""Ray's metrics, `f2llm_train_<name>`; all carry the label stage, the loss also source (docs/training.md)."""
SOURCE_LOSS = "source_loss/"  # before a source's name, in the name of its running loss
RUN_TAG = "f2llm.run"
"""Tag of an MLflow run with the id by which a later try finds it."""
MLFLOW_SECONDS, MLFLOW_VALUES = 5.0, 1000
"""Seconds between two requests to MLflow's server, and the most values that one takes."""


class Tracker(Protocol):
    """Shows values by name."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Adds values of a step; it may come in several calls, and again after a resume."""

    def close(self) -> None:
        """Writes out what is buffered."""
        return


class _RayMetrics(Tracker):
    """Gauges for Ray's dashboard and Prometheus; setting one takes 3 microseconds."""

    def __init__(self, stage: str) -> None:
        from ray.util.metrics import Gauge

        self.tags, of_sources = {"stage": stage}, ("stage", "source")
        self.gauges = {
            name: Gauge(f"f2llm_train_{name}", about, of_sources if name == "loss" else ("stage",))
            for name, about in GAUGES.items()
        }

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in {**values, "step": step}.items():
            if name.startswith(SOURCE_LOSS):
                self.gauges["loss"].set(value, {**self.tags, "source": name.removeprefix(SOURCE_LOSS)})
            elif name in self.gauges and name != "loss":  # that of the step, over all its sources
                self.gauges[name].set(value, self.tags)


class _TensorBoard:
    """Event files in a local folder; those of steps after `first`, from an earlier try, are replaced."""

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first + 1)
        self.close = self.writer.close

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)


class _MlflowRun:
    """A run in an MLflow experiment. A server that cannot be reached later on loses values, never the training."""

    def __init__(self, settings: Mlflow, training: Training, run_id: str, say: Callable[[str], None]) -> None:
        from mlflow import MlflowClient

        self.client, self.say, self.lost = MlflowClient(settings.uri), say, 0
        experiment = settings.experiment or training.run_name
        found = self.client.get_experiment_by_name(experiment)
        place = self.client.create_experiment(experiment) if found is None else found.experiment_id
        runs = self.client.search_runs([place], f"tags.`{RUN_TAG}` = '{run_id}'", max_results=1)
        name, tags = training.model_name, {RUN_TAG: run_id}
        run = runs[0] if runs else self.client.create_run(place, run_name=name, tags=tags)
        self.run_id = run.info.run_id
        if runs:
            self.client.update_run(self.run_id, "RUNNING")
        else:
            for key, value in training.facts().items():
                self.client.log_param(self.run_id, key, str(value)[:500])
        self.buffer, self.sent = list[Any](), time.monotonic()
        self.sender = ThreadPoolExecutor(max_workers=1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.buffer += [Metric(name, value, now, step) for name, value in values.items()]
        if time.monotonic() - self.sent > MLFLOW_SECONDS:
            self._send()

    def close(self) -> None:
        self._send()
        self.sender.submit(self._request, self.client.set_terminated)
        self.sender.shutdown()
        if self.lost:
            self.say(f"MLflow: {self.lost:,} values were not taken")

    def _send(self) -> None:
        values, self.buffer, self.sent = self.buffer, [], time.monotonic()
        for start in range(0, len(values), MLFLOW_VALUES):
            self.sender.submit(self._request, self.client.log_batch, values[start : start + MLFLOW_VALUES])

    def _request(self, request: Callable[..., Any], *values: list[Any]) -> None:
        try:
            request(self.run_id, *values)
        except Exception as error:  # noqa: BLE001 - no error of a server's may end the training
            if not self.lost:
                self.say(f"MLflow: {type(error).__name__}: {error}"[:300])
            self.lost += sum(map(len, values))


class _WandbRun:
    """A run in a Weights & Biases project; its own process sends or, offline, writes for `wandb sync`."""

    def __init__(self, settings: Wandb, training: Training, run_id: str, folder: Path | None) -> None:
        import wandb

        self.teardown = wandb.teardown
        self.run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode="offline" if settings.offline else "online",
            id=run_id,
            name=training.model_name,
            resume="allow",
            dir=folder,
            config=training.facts(),
            # The first worker's console and machine are not what is tracked.
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)  # steps that the run has already are left as they are

    def close(self) -> None:
        self.run.finish()
        self.teardown()  # its process writes an offline run out only now (wandb 0.31), and a worker may be killed


def open_trackers(training: Training, out: Folder, *, first: int, say: Callable[[str], None]) -> list[Tracker]:
    """Opens Ray's metrics and the trackers that the training's `tracking` names.

    Args:
        training: its settings are kept with the values.
        out: the stage's folder; a local one gets `tensorboard/` and `wandb/`, an object store none.
        first: step that the stage goes on from.
        say: prints a sentence, when a tracker loses values.

    Raises:
        RunError: a tracker cannot be opened: not installed, no such server, no access.
    """
    settings, trackers = training.tracking, list[Tracker]([_RayMetrics(training.stage)])
    run_id = f"{training.stage}-{hashlib.sha256(out.uri.encode()).hexdigest()[:16]}"
    try:
        if settings.tensorboard and out.local and importlib.util.find_spec("tensorboard"):
            trackers.append(_TensorBoard(out.local / "tensorboard", first))
        if settings.mlflow is not None:
            trackers.append(_MlflowRun(settings.mlflow, training, run_id, say))
        if settings.wandb is not None:
            trackers.append(_WandbRun(settings.wandb, training, run_id, out.local))
    except ImportError as error:
        raise RunError(
            f"tracking: {error}; the extras mlflow and wandb bring what trackers need, but for a store that is a "
            "database, which takes the whole package mlflow"
        ) from None
    except Exception as error:  # each library has errors of its own
        raise RunError(f"tracking: cannot be opened: {type(error).__name__}: {error}") from error
    return trackers
