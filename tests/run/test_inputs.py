"""Inputs are known by their content: not by name, place or time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from f2llm_ray.base.errors import DataError
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import (
    InputFile,
    InputIndex,
    KnownInput,
    differences,
    digests,
    model_inputs,
    tokenizer_inputs,
)


def known(*paths: Path, root: Path | None = None) -> tuple[KnownInput, ...]:
    index = InputIndex(None if root is None else Folder.at(str(root)))
    return index.known(InputFile(Folder.at(str(path)).uri, None) for path in paths)


def test_the_same_content_is_the_same_input_wherever_it_lies(tmp_path: Path) -> None:
    one, other = tmp_path / "a.jsonl", tmp_path / "sub" / "b.jsonl"
    other.parent.mkdir()
    one.write_text("text\n")
    other.write_text("text\n")
    assert known(one)[0].digest == known(other)[0].digest
    before = known(one)[0].digest
    os.utime(one, (1, 1))
    assert known(one)[0].digest == before, "a file that was only touched is no other input"
    one.write_text("tex!\n")
    assert known(one)[0].digest != before, "as many bytes, but others"


def test_two_spellings_of_a_path_are_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").write_text("a")
    assert Folder.at("./x.jsonl").uri == Folder.at("x.jsonl").uri == str(tmp_path / "x.jsonl")


def test_an_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")
    first = known(file, root=tmp_path)
    times = file.stat()
    file.write_text("behind")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert known(file, root=tmp_path) == first, "size and time are those that were hashed"
    os.utime(file, (5, 5))
    assert known(file, root=tmp_path)[0].digest != first[0].digest


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt: found no such file"):
        known(tmp_path / "gone.txt")


def test_changes_are_named_by_file() -> None:
    def inputs(**files: str) -> dict[str, list[KnownInput]]:
        return {"sources.a": [KnownInput(name, 1, "1", digest) for name, digest in files.items()]}

    assert differences(inputs(x="1", y="2"), inputs(x="1", y="3")) == ["y changed"]
    assert differences(inputs(x="1"), inputs(x="1", z="4")) == ["z is new"]
    assert differences(inputs(x="1", y="2"), inputs(x="1")) == ["y is gone"]
    there = str(Path(__file__))
    assert differences(inputs(x="1", **{there: "2"}), inputs(x="1")) == [f"{there} is not read any more"]
    assert differences({"t": [KnownInput("hub:a/b", None, "", "a/b")]}, {}) == ["hub:a/b is not read any more"]
    assert differences(inputs(x="1"), inputs(renamed="1")) == [], "a file that was renamed holds the same"
    assert "another order" in differences(inputs(x="1", y="2"), inputs(y="2", x="1"))[0]
    assert digests(inputs(x="1", y="2")) == {"sources.a": ["1", "2"]}


def test_models_and_tokenizers_are_known_by_their_files(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        (tmp_path / name).write_text(name)
    names = [file.uri.rpartition("/")[2] for file in model_inputs(str(tmp_path))]
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [file.uri.rpartition("/")[2] for file in tokenizer_inputs(str(tmp_path))] == ["tokenizer.json"]
    assert model_inputs("Qwen/Qwen3-0.6B") == [InputFile("hub:Qwen/Qwen3-0.6B", None, "Qwen/Qwen3-0.6B")]
