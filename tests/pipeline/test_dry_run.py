"""`--dry-run` on every job: it says what would run, starts no Ray, and leaves the disk as it is."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import ray

from f2llm_ray.pipeline.declare import declare
from f2llm_ray.pipeline.dry_run import overview
from f2llm_ray.pipeline.walk import replaced_report
from f2llm_ray.recipe.files import load_recipe
from f2llm_ray.run.root import Run
from tests.corpus import write_corpus, write_recipe
from tests.tiny import tiny_model

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.py"))
OTHERWISE = {"plan", "publish", "export", "cut", "pairs"}
"""plan.py runs nothing at all; the dry runs of the others are tested with them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry")
    recipe = write_corpus(folder)
    write_recipe(folder, {**recipe, "mine": {"model": "untrained"}, "quantize": {"models": ["distilled"]}})
    (folder / "variants.yaml").write_text("variants: {slow: {stages: {stage1: {lr: 0.001}}}}\n")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(5)))
    for name in ("one", "two"):
        tiny_model(folder / name, hidden=16 if name == "one" else 32)
    return folder


def arguments(job: str, folder: Path) -> list[str]:
    found = ["--recipe", str(folder / "recipe.yaml"), "--root", str(folder / "root"), "--dry-run"]
    texts = ["--input", str(folder / "texts.jsonl"), "--column", "text", "--output", str(folder / "vectors")]
    more = {
        "ablate": ["--variants", str(folder / "variants.yaml")],
        "compare": [str(folder / "one"), str(folder / "two")],
        "embed": ["--model", str(folder / "one"), *texts, "--shard-rows", "2"],
    }
    return [*found, *more.get(job, [])]


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("job", [path.stem for path in JOBS if path.stem not in OTHERWISE])
def test_a_job_says_what_it_would_do_and_does_nothing(
    job: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    path = next(path for path in JOBS if path.stem == job)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments(job, folder)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    told = capsys.readouterr()
    assert ended.value.code == 0, told.err
    assert "would" in told.out
    assert not ray.is_initialized()
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert {path for path in after if before.get(path) != after[path]} <= {
        folder,
        folder / "root",
        *inputs(folder),
    }


def test_another_run_in_the_root_is_named(folder: Path, tmp_path: Path) -> None:
    recipe, run = load_recipe(str(folder / "recipe.yaml")), Run(str(tmp_path))
    assert replaced_report(recipe, run) is None
    for name in ("small", "other"):
        run.root.write_json("report.json", {"name": name})
        said = replaced_report(recipe, run)
        lines = overview(declare(recipe, run), run)
        assert (said is None) == (name == "small")
        assert [line for line in lines if "--root" in line] == ([] if said is None else [said])
    assert said is not None
    assert said.startswith(f"{tmp_path} holds the run 'other': the report of 'small' replaces its report.html")


def inputs(folder: Path) -> set[Path]:
    """What a root remembers of the contents of files, so that they are not read again."""
    return {folder / "root" / "inputs.json"}
