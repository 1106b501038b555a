"""`ray job submit` as a user does it: a head with token authentication, our submitter, a refused stranger."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from f2llm_ray.pipeline.declare import declare
from f2llm_ray.recipe.files import load_recipe
from f2llm_ray.run.root import Run
from tests.corpus import write_corpus, write_recipe

REPO = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def submit(environment: dict[str, str], recipe: Path, root: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPO / "cluster" / "submit.py", "--address", environment["HEAD"]]
    return subprocess.run(
        [*command, "--recipe", recipe, "--root", root, *flags],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )


def test_a_job_runs_with_this_code_and_a_second_one_skips_it(head: dict[str, str], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, write_corpus(tmp_path))
    first = submit(head, recipe, tmp_path / "root", "--job", "prepare")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "prepare: finished in" in first.stdout
    # The very run that the recipe is here: on the way to the cluster nothing is lost, nor the order of sources.
    (made,) = (tmp_path / "root").glob("prepare-*/manifest.json")
    assert (
        made.parent.name == declare(load_recipe(str(recipe), []), Run(str(tmp_path / "none"))).prepare.folder_name
    )
    second = submit(head, recipe, tmp_path / "root", "--job", "prepare")
    assert "prepare: finished before, skipped" in second.stdout


def test_a_failed_job_says_why(head: dict[str, str], tmp_path: Path) -> None:
    recipe = write_corpus(tmp_path)
    (tmp_path / "labels.csv").unlink()
    failed = submit(head, write_recipe(tmp_path, recipe), tmp_path / "root", "--job", "prepare")
    assert failed.returncode == 1
    assert "labels.csv" in failed.stdout
    assert failed.stderr.startswith("error: raysubmit_")


def test_who_has_no_token_at_all_is_told_how_to_get_one(head: dict[str, str], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, write_corpus(tmp_path))
    nobody = {key: value for key, value in head.items() if key != "RAY_AUTH_TOKEN"}
    refused = submit({**nobody, "HOME": str(tmp_path)}, recipe, tmp_path / "root", "--job", "prepare")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "token" in refused.stderr


def test_without_the_token_a_job_is_refused(head: dict[str, str], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, write_corpus(tmp_path))
    stranger = {**head, "RAY_AUTH_TOKEN": "0" * 32}
    for environment in (stranger, {**stranger, "RAY_AUTH_MODE": "disabled"}):
        refused = submit(environment, recipe, tmp_path / "root", "--job", "prepare")
        assert refused.returncode == 1
        assert "uthenticat" in refused.stderr or "401" in refused.stderr or "oken" in refused.stderr, (
            refused.stderr
        )
        assert not (tmp_path / "root").exists()
        raw = subprocess.run(
            [BIN / "ray", "job", "submit", "--address", head["HEAD"], "--", "true"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert raw.returncode != 0
