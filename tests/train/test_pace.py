"""`max_minutes`: steps are timed, their number is fixed once, and is all that the training takes from it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from f2llm_ray.base.errors import RecipeError, RunError
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.recipe.files import load_recipe, parse
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.train.pace import Pace, steps_in
from tests.corpus import write_corpus, write_recipe
from tests.jobs import start_job

REPO = Path(__file__).parents[2]
times = st.floats(0.001, 50)


@given(minutes=st.floats(0.01, 500), step=times, validation=times, every=st.integers(1, 1000))
def test_as_many_steps_as_fit_and_no_more(minutes: float, step: float, validation: float, every: int) -> None:
    pace = Pace(step, validation)
    if step + validation > 60 * minutes:
        with pytest.raises(RunError, match=r"stage 's': max_minutes is .*, but a step and a validation take"):
            steps_in(minutes, pace, every, stage="s")
        return
    steps = steps_in(minutes, pace, every, stage="s")
    checkpoints = sum(done % every == 0 for done in range(1, min(steps, 3000)))
    if steps <= 3000:
        assert steps * step + (checkpoints + 1) * validation <= 60 * minutes * (1 + 1e-9)
    assert pace.seconds(steps, every) <= 60 * minutes < pace.seconds(steps + 1, every) * (1 + 1e-9)


@pytest.mark.parametrize("other", [{"epochs": 1}, {"max_steps": 5}])
def test_a_stage_says_its_length_once(tmp_path: Path, other: dict[str, Any]) -> None:
    content = write_corpus(tmp_path)
    del content["stages"]["stage1"]["epochs"]
    content["stages"]["stage1"] |= {"max_minutes": 1.5, **other}
    with pytest.raises(RecipeError, match=rf"max_minutes: says how long .* so does {next(iter(other))}"):
        parse(Recipe, content, "r")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pace")
    content = write_corpus(folder)
    for name in ("labels", "clusters"):
        del content["sources"][name]
    del content["stages"]["stage1"]["epochs"], content["prune"], content["distill"]["max_steps"]
    # Some hundred steps: enough to be interrupted on the way.
    content["stages"]["stage1"] |= {"max_minutes": 0.2, "checkpoint_every": 8, "validation_rows": 16}
    content["distill"] |= {"teacher": "stage1", "model": "untrained", "max_minutes": 0.05, "validation_rows": 16}
    content["evaluation"] = {"sets": {}}
    return write_recipe(folder, content)


def manifest(root: Path, stage: str) -> dict[str, Any]:
    (found,) = root.glob(f"{stage}-[0-9a-f]*/manifest.json")
    facts: dict[str, Any] = json.loads(found.read_text())
    return facts


@pytest.fixture(scope="module")
def cut_off(recipe: Path) -> dict[str, Any]:
    """A run that Ctrl-C ended after the first checkpoint of its stage, and what it had fixed by then."""
    root = recipe.parent / "root"
    process = start_job("pipeline", "--recipe", recipe, "--root", root)
    end = time.monotonic() + 250
    while not list(root.glob("stage1-*/ray_train/checkpoint_*/part-00001-of-00002.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output = process.communicate(timeout=60)[0]
    assert not list(root.glob("stage1-*/manifest.json"))
    assert process.returncode == 130, output
    return {"root": root, "output": output, "pace": manifest(root, "pace-stage1")["pace"]}


@pytest.mark.timeout(400)
def test_ctrl_c_in_a_training_is_told_in_one_line(cut_off: dict[str, Any]) -> None:
    lines = cut_off["output"].splitlines()
    assert lines[-1] == "interrupted; run the same command again to go on", cut_off["output"]
    assert "Traceback" not in cut_off["output"]
    for told in ("pace-stage1: starts 2 workers", "pace-stage1: times up to 23 steps, and a validation"):
        assert told in lines
    assert {"stage1: starts 2 workers", "stage1: workers read the model"} <= set(lines)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_goes_on_keeps_its_steps_and_max_steps_makes_the_same_model(
    cut_off: dict[str, Any], recipe: Path, ray_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    del ray_here
    root, pace = cut_off["root"], cut_off["pace"]
    assert f"stage1: {pace['steps']:,} steps in 0.2 minutes" in cut_off["output"]
    Pipeline(load_recipe(str(recipe)), str(root)).model("stage1")
    output = capsys.readouterr().out
    assert "pace-stage1: finished before, skipped" in output
    assert "stage1: goes on from step" in output
    done = manifest(root, "stage1")
    assert done["pace"] == pace
    assert done["training"]["steps"] == pace["steps"]
    assert pace["timed_steps"] > 1
    same = load_recipe(str(recipe), ["stages.stage1.max_minutes=null", f"stages.stage1.max_steps={pace['steps']}"])
    (before,) = root.glob("stage1-*/model/model.safetensors")
    Pipeline(same, str(root)).model("stage1")
    (after,) = set(root.glob("stage1-*/model/model.safetensors")) - {before}
    ours, theirs = load_file(before), load_file(after)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_distillation_teaches_the_batches_of_the_steps_that_fit(
    cut_off: dict[str, Any], recipe: Path, ray_here: None
) -> None:
    del ray_here
    root = cut_off["root"]
    pipeline = Pipeline(load_recipe(str(recipe)), str(root))
    for name in ("stage1", "distilled"):
        pipeline.model(name)
    steps = manifest(root, "pace-distilled")["pace"]["steps"]
    assert manifest(root, "distilled")["training"]["steps"] == steps
    assert manifest(root, "taught-distilled")["parents"]["pace"].startswith("pace-distilled-")
