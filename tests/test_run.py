"""A stage is known by what goes into it, and finished only when its manifest is there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from f2llm_ray.base.errors import RunError
from f2llm_ray.pipeline.stages import plan
from f2llm_ray.recipe.files import load_recipe
from f2llm_ray.run.folder import Folder, Run, Stage


def hashes(*overrides: str) -> dict[str, str]:
    return {stage.name: stage.hash for stage in plan(load_recipe("quickstart", overrides)).stages()}


def changed(*overrides: str) -> set[str]:
    before, after = hashes(), hashes(*overrides)
    return {name for name in before if before[name] != after[name]}


def test_a_changed_setting_changes_only_what_depends_on_it() -> None:
    assert changed("distill.lr=0.5") == {"distilled", "evaluate-distilled"}
    assert changed("prune.ffn=16") == {"pruned", "distilled", "evaluate-pruned", "evaluate-distilled"}
    assert changed("serving.max_inputs=3", "name=other", "compute.workers=1") == set()
    assert changed("evaluation.divisors=[1]") == {name for name in hashes() if name.startswith("evaluate-")}
    assert changed("seed=99") == set(hashes())
    trained = changed("sources.plone_ui.weight=2")
    assert {"stage1", "stage2", "taught", "distilled"} < trained
    assert not {"prepare", "untrained"} & trained, "how often a row is seen is no matter of its text"


def test_the_order_of_sources_counts() -> None:
    recipe = load_recipe("quickstart")
    turned = recipe.model_copy(update={"sources": dict(reversed(recipe.sources.items()))})
    assert plan(recipe).prepare.hash != plan(turned).prepare.hash


def test_a_hash_covers_name_settings_and_parents() -> None:
    base = Stage(name="a", settings={"x": 1})
    others = [Stage(name="b", settings={"x": 1}), Stage(name="a", settings={"x": 2})]
    others.append(Stage(name="a", settings={"x": 1}, parents=(base,)))
    assert len({base.hash, *(other.hash for other in others)}) == 4
    assert base.hash == Stage(name="a", settings={"x": 1}).hash


@pytest.mark.parametrize("scheme", ["", "file://", "memory://"])
def test_a_stage_is_finished_by_its_manifest_alone(tmp_path: Path, scheme: str) -> None:
    run = Run(f"{scheme}{tmp_path}/root")
    stage = Stage(name="prepare", settings={})
    folder = run.folder(stage)
    folder.write_bytes("half-done.bin", b"x" * 100)
    assert run.manifest(stage) is None
    with pytest.raises(RunError, match=r"not finished; run jobs/prepare\.py"):
        run.require(stage, "jobs/prepare.py")
    run.finish(stage, started=time.time(), rows=3)
    manifest = run.manifest(stage)
    assert manifest is not None
    assert (manifest["rows"], manifest["hash"]) == (3, stage.hash)
    assert folder.files() == ["half-done.bin", "manifest.json"]


def test_folders_copy_both_ways(tmp_path: Path) -> None:
    remote = Folder.at("memory://bucket/run") / "model"
    with remote.writing() as local:
        (local / "a.txt").write_text("hello")
        (local / "sub").mkdir()
        (local / "sub" / "b.txt").write_text("there")
    with remote.as_local() as copy:
        assert (copy / "a.txt").read_text() == "hello"
        assert (copy / "sub" / "b.txt").read_text() == "there"
    here = Folder.at(str(tmp_path))
    with here.as_local() as same:
        assert same == tmp_path


def test_unusable_roots_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nowhere://x"):
        Folder.at("nowhere://x")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        (Folder.at(str(tmp_path)) / "file" / "below").create()
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RunError, match=r"manifest\.json: not JSON"):
        Folder.at(str(tmp_path)).read_json("manifest.json")
