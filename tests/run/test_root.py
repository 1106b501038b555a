"""A stage is known by what goes into it, and finished only when its manifest is there."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from f2llm_ray.base.errors import RunError
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import KnownInput
from f2llm_ray.run.root import Run
from f2llm_ray.run.stage import Stage, changes


def test_a_hash_covers_name_settings_and_parents() -> None:
    def stage(name: str = "a", x: int = 1, **more: Any) -> Stage:
        return Stage(name=name, job="a", settings={"x": x}, **more)

    base, file = stage(), KnownInput("f.txt", 1, "1", "digest")
    others = [stage(name="b"), stage(x=2), stage(parents={"student": base}), stage(parents={"teacher": base})]
    others.append(stage(inputs={"files": [file]}))
    assert len({base.hash, *(other.hash for other in others)}) == 6
    assert base.hash == stage(work=lambda _: {}, implied=True, needs=(others[0],)).hash
    moved = KnownInput("elsewhere.txt", 1, "2", "digest")
    assert stage(inputs={"files": [file]}).hash == stage(inputs={"files": [moved]}).hash


def test_what_changed_is_told_in_words() -> None:
    def stage(lr: float, digest: str, parent: Stage) -> Stage:
        return Stage(
            name="stage2",
            job="train",
            settings={"lr": lr, "engine": {"precision": "fp32"}},
            inputs={"teacher": [KnownInput("t/model.safetensors", 1, "1", digest)]},
            parents={"student": parent},
        )

    first, second = (Stage(name="stage1", job="train", settings={"lr": lr}) for lr in (1, 2))
    old = stage(2e-3, "a", first)
    manifest = {
        "settings": old.settings,
        "inputs": {"teacher": [asdict(entry) for entry in old.inputs["teacher"]]},
        "parents": {"student": first.folder_name},
    }
    assert changes(manifest, old) == []
    assert changes(manifest, stage(1e-3, "a", first)) == ["lr 0.002 -> 0.001"]
    assert changes(manifest, stage(2e-3, "b", first)) == ["t/model.safetensors changed"]
    assert changes(manifest, stage(2e-3, "a", second)) == ["stage1 is another one"]


@pytest.mark.parametrize("scheme", ["", "file://", "memory://"])
def test_a_stage_is_finished_by_its_manifest_alone(tmp_path: Path, scheme: str) -> None:
    run = Run(f"{scheme}{tmp_path}/root")
    stage = Stage(name="prepare", job="prepare", settings={})
    folder = run.folder(stage)
    folder.write_bytes("half-done.bin", b"x" * 100)
    assert run.manifest(stage) is None
    with pytest.raises(RunError, match="not finished; run `f2llm prepare` first"):
        run.require(stage)
    run.finish(stage, started=time.time(), rows=3)
    manifest = run.manifest(stage)
    assert manifest is not None
    assert (manifest["rows"], manifest["hash"]) == (3, stage.hash)
    assert folder.files() == ["half-done.bin", "manifest.json"]


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_the_seconds_of_tries_that_were_cut_off_count(tmp_path: Path, scheme: str) -> None:
    run, now = Run(f"{scheme}{tmp_path}/root"), time.time()
    stage = Stage(name="stage1", job="train", settings={})
    for seconds in (100, 20):
        run.cut_off(stage, started=now - seconds)
        assert run.manifest(stage) is None
    assert run.finish(stage, started=now - 3)["seconds"] == pytest.approx(123, abs=2)
    assert run.folder(stage).files() == ["manifest.json"]
    assert run.finish(stage, started=now - 3)["seconds"] == pytest.approx(3, abs=2)


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
