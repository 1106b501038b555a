"""Trackers: where a stage's values are kept for people to look at; TensorBoard, MLflow and Weights & Biases.

Each writes in the background, so that a slow server does not slow the steps down. A stage that was cut off goes on
in the same TensorBoard folder, MLflow run or W&B run. Keys and passwords come from the environment variables that
these libraries read themselves; a recipe holds none.
"""

from __future__ import annotations

import hashlib
import importlib.util
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from f2llm_ray.base.errors import RunError
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.settings import Mlflow, TrainStage, Wandb

RUN_TAG = "f2llm.run"
"""Tag of an MLflow run with the id by which a later try finds it."""
MLFLOW_SECONDS = 5.0
"""Between two requests to MLflow's server; each takes up to 1,000 values."""
MLFLOW_VALUES = 1000


class Tracker(Protocol):
    """Takes the values of steps."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes values by name; a step may come in several calls, and again after a resume."""

    def close(self) -> None:
        """Writes out what is held back."""


class TensorBoard:
    """Event files in a local folder; what they have of steps after `first` is replaced."""

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes values by name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes out what is held back."""
        self.writer.close()


class MlflowRun:
    """A run in an MLflow experiment. A server that cannot be reached later on loses values, never the training."""

    def __init__(
        self,
        settings: Mlflow,
        *,
        experiment: str,
        name: str,
        run_id: str,
        facts: Mapping[str, Any],
        tell: Callable[[str], None],
    ) -> None:
        from concurrent.futures import ThreadPoolExecutor

        from mlflow import MlflowClient

        self.client, self.tell, self.lost = MlflowClient(settings.uri), tell, 0
        found = self.client.get_experiment_by_name(experiment)
        place = self.client.create_experiment(experiment) if found is None else found.experiment_id
        runs = self.client.search_runs([place], f"tags.`{RUN_TAG}` = '{run_id}'", max_results=1)
        run = runs[0] if runs else self.client.create_run(place, run_name=name, tags={RUN_TAG: run_id})
        self.run_id = run.info.run_id
        if runs:
            self.client.update_run(self.run_id, "RUNNING")
        else:
            for key, value in facts.items():
                self.client.log_param(self.run_id, key, str(value)[:500])
        self.waiting: list[Any] = []
        self.sent = time.monotonic()
        self.sender = ThreadPoolExecutor(max_workers=1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes values by name."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.waiting += [Metric(name, value, now, step) for name, value in values.items()]
        if time.monotonic() - self.sent > MLFLOW_SECONDS:
            self._send()

    def close(self) -> None:
        """Sends what is held back and marks the run as finished."""
        self._send()
        self.sender.submit(self._told, self.client.set_terminated, self.run_id)
        self.sender.shutdown()
        if self.lost:
            self.tell(f"MLflow: {self.lost:,} values were not taken")

    def _send(self) -> None:
        values, self.waiting, self.sent = self.waiting, [], time.monotonic()
        for start in range(0, len(values), MLFLOW_VALUES):
            self.sender.submit(
                self._told, self.client.log_batch, self.run_id, values[start : start + MLFLOW_VALUES]
            )

    def _told(self, request: Callable[..., Any], run_id: str, *values: list[Any]) -> None:
        try:
            request(run_id, *values)
        except Exception as error:  # noqa: BLE001 - whatever a server says, training goes on and the user hears of it
            if not self.lost:
                self.tell(f"MLflow: {type(error).__name__}: {error}"[:300])
            self.lost += sum(map(len, values))


class WandbRun:
    """A run in a Weights & Biases project; its own process sends or, offline, writes for `wandb sync`."""

    def __init__(
        self, settings: Wandb, *, folder: Path | None, name: str, run_id: str, facts: Mapping[str, Any]
    ) -> None:
        import wandb

        self.run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode="offline" if settings.offline else "online",
            id=run_id,
            name=name,
            resume="allow",
            dir=folder,
            config=dict(facts),
            # The first worker's console and machine are not what is tracked.
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes values by name; steps that the run has already are left as they are."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """Waits for what is on its way."""
        import wandb

        self.run.finish()
        wandb.teardown()  # its process writes an offline run out only now (wandb 0.31), and a worker may be killed


def open_trackers(
    recipe: Recipe, name: str, stage: TrainStage, out: Folder, *, first: int, tell: Callable[[str], None]
) -> list[Tracker]:
    """Opens what the recipe's `tracking` asks for.

    Args:
        recipe: the run's recipe.
        name: the stage's name.
        stage: its settings, kept with the values.
        out: the stage's folder; a local one gets `tensorboard/` and `wandb/`, an object store none.
        first: step that the stage goes on from.
        tell: gets a sentence when a tracker loses values.

    Raises:
        RunError: a tracker cannot be opened: not installed, no such server, no access.
    """
    settings, trackers = recipe.tracking, list[Tracker]()
    facts = {"recipe": recipe.name, "stage": name, "seed": recipe.seed, **stage.model_dump(mode="json")}
    run_id = f"{name}-{hashlib.sha256(out.uri.encode()).hexdigest()[:16]}"
    title = f"{recipe.name}-{name}"
    try:
        if settings.tensorboard and out.local and importlib.util.find_spec("tensorboard"):
            trackers.append(TensorBoard(out.local / "tensorboard", first))
        if settings.mlflow is not None:
            experiment = settings.mlflow.experiment or recipe.name
            trackers.append(
                MlflowRun(
                    settings.mlflow, experiment=experiment, name=title, run_id=run_id, facts=facts, tell=tell
                )
            )
        if settings.wandb is not None:
            trackers.append(WandbRun(settings.wandb, folder=out.local, name=title, run_id=run_id, facts=facts))
    except ImportError as error:
        raise RunError(
            f"tracking: {error}; the extras mlflow and wandb bring what trackers need, but for a store that is a "
            "database, which takes the whole package mlflow"
        ) from None
    except Exception as error:  # each library has errors of its own
        raise RunError(f"tracking: cannot be opened: {type(error).__name__}: {error}") from error
    return trackers
