"""Trackers keep what they are given, go on where they were, and never stop a training."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from f2llm_ray.base.errors import RecipeError, RunError
from f2llm_ray.data.schema import SourceFacts
from f2llm_ray.engine.settings import Compute
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.recipe.files import parse
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.settings import EngineSettings, Tracking, TrainStage
from f2llm_ray.train.trackers import Tracker, open_trackers
from f2llm_ray.train.training import Training
from tests.corpus import write_corpus

STAGE = "only"


def opened(tracking: dict[str, Any], out: Path, first: int = 0) -> tuple[list[Tracker], list[str]]:
    """The trackers that are asked for, but Ray's metrics, which are always there."""
    training = Training(
        stage=STAGE,
        model_name=f"tracked-{STAGE}",
        run_name="tracked",
        settings=TrainStage(engine=EngineSettings(precision="fp32")),
        sources={"pairs": SourceFacts("retrieval", "")},
        seed=0,
        compute=Compute(),
        tracking=Tracking.model_validate({"tensorboard": False, **tracking}),
    )
    told = list[str]()
    _, *trackers = open_trackers(training, Folder.at(str(out)), first=first, say=told.append)
    return trackers, told


def test_tracking_is_no_part_of_any_stage(tmp_path: Path) -> None:
    given, root = write_corpus(tmp_path, rows=20), str(tmp_path / "root")
    one, other = (
        Pipeline(parse(Recipe, {**given, "tracking": tracking}, "test"), root).graph
        for tracking in ({}, {"wandb": {"project": "p"}})
    )
    assert [stage.hash for stage in one.stages()] == [stage.hash for stage in other.stages()]


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, steps in ((0, range(1, 6)), (3, range(4, 8))):
        ((tracker,), _) = opened({"tensorboard": True}, tmp_path, first)
        for step in steps:
            tracker.log({"loss": 1 / step}, step)
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (step, pytest.approx(1 / step)) for step in range(1, 8)
    ]


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for steps in (range(1, 4), range(3, 6)):
        ((tracker,), told) = opened({"mlflow": {"uri": uri}}, tmp_path, steps[0] - 1)
        for step in steps:
            tracker.log({"loss": 1 / step, "source_loss/pairs": 2.0}, step)
        tracker.close()
        assert told == []
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tracked")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", f"tracked-{STAGE}")
    assert run.data.params["stage"] == STAGE
    seen = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
    assert seen == {step: pytest.approx(1 / step) for step in range(1, 6)}


def test_a_server_that_goes_away_is_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    monkeypatch.setattr("f2llm_ray.train.trackers.MLFLOW_SECONDS", 0.0)
    ((tracker,), told) = opened({"mlflow": {"uri": f"sqlite:///{tmp_path}/mlflow.db"}}, tmp_path)
    tracker.client.delete_run(tracker.run_id)  # type: ignore[attr-defined]  # a run that takes nothing any more
    for step in range(1, 4):
        tracker.log({"loss": 1.0}, step)
    tracker.close()
    assert len(told) == 2
    assert told[-1] == "MLflow: 3 values were not taken"


def test_wandb_writes_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    ((tracker,), _) = opened({"wandb": {"project": "p", "offline": True}}, tmp_path)
    tracker.log({"loss": 0.125}, 1)
    tracker.close()
    (written,) = (tmp_path / "wandb").glob("**/*.wandb")
    assert b"loss" in written.read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"tracking: .*wandb.*extras"):
        opened({"wandb": {"project": "p"}}, tmp_path)


def test_a_recipe_holds_no_password() -> None:
    with pytest.raises(RecipeError, match="MLFLOW_TRACKING_PASSWORD") as error:
        parse(Tracking, {"mlflow": {"uri": "https://me:secret@tracking.example/x"}}, "test")
    assert "secret" not in str(error.value)
