"""Files that change between two runs: the result is a fresh run's, and what stays is not read again."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from f2llm_ray.base.errors import DataError
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.recipe.files import load_recipe
from f2llm_ray.run.folder import Folder
from tests.corpus import write_recipe
from tests.tiny import tiny_model

KEPT = ("rows", "table", "tokens", "card.json")


pytestmark = pytest.mark.usefixtures("ray_here")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Three files of 20 rows, read in the order of their names."""
    for name in "abc":
        write(tmp_path / "data" / f"{name}.jsonl", 20)
    content: dict[str, Any] = {
        "name": "reuse",
        "sources": {"docs": {"format": "jsonl", "paths": [str(tmp_path / "data" / "*.jsonl")], "language": "eng"}},
        "data": {"max_tokens": 32, "validation": 0.1, "shards": 2, "near_dedup": {}},
        "tokenizer": {"path": str(tiny_model(tmp_path / "tiny"))},
        "backbone": {"shape": {"hidden": 32, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 64}},
        "stages": {"stage1": {"engine": {"precision": "fp32"}}},
    }
    return write_recipe(tmp_path, content)


def write(path: Path, rows: int, more: str = "") -> None:
    path.parent.mkdir(exist_ok=True)
    said = [{"query": f"{path.stem} asks {n}", "passage": f"{path.stem} is told {n * n}"} for n in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in said) + more)


def prepare(recipe: Path, root: str) -> Folder:
    pipeline = Pipeline(load_recipe(str(recipe)), str(recipe.parent / root))
    pipeline.job("prepare")
    return pipeline.run.folder(pipeline.graph.prepare)


def digests(prepared: Folder) -> dict[str, str]:
    """What training reads, by file."""
    place = Path(prepared.path)
    files = [file for name in KEPT for file in [place / name, *(place / name).rglob("*")] if file.is_file()]
    timed = {str(place / "card.json"): without_times}
    return {
        str(file.relative_to(place)): hashlib.sha256(timed.get(str(file), Path.read_bytes)(file)).hexdigest()
        for file in files
    }


def without_times(card: Path) -> bytes:
    return re.sub(rb'"seconds": [\d.]+', b"", card.read_bytes())


def parts_read_before(output: str) -> int:
    found = re.findall(r"(\d+) parts read before", output)
    return int(found[-1]) if found else 0


def add_rows(folder: Path) -> None:
    write(folder / "b.jsonl", 25)


def rewrite(folder: Path) -> None:
    write(folder / "b.jsonl", 20)
    (folder / "b.jsonl").write_text((folder / "b.jsonl").read_text().replace("told", "TOLD"))


def remove(folder: Path) -> None:
    (folder / "b.jsonl").unlink()


def add_file(folder: Path) -> None:
    write(folder / "aa.jsonl", 20)


def rename(folder: Path) -> None:
    (folder / "a.jsonl").rename(folder / "z.jsonl")


@pytest.mark.parametrize(
    ("change", "again"), [(add_rows, 2), (rewrite, 2), (remove, 2), (add_file, 3), (rename, 3)]
)
def test_a_changed_source_gives_what_a_fresh_run_does_from_the_parts_that_stay(
    recipe: Path, change: Any, again: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(prepare(recipe, "root"))
    change(recipe.parent / "data")
    capsys.readouterr()
    after = digests(prepare(recipe, "root"))
    assert parts_read_before(capsys.readouterr().out) == again
    assert after != before
    assert after == digests(prepare(recipe, "fresh"))


def test_a_file_taken_out_after_a_refused_run_leaves_the_rows_of_the_others(recipe: Path) -> None:
    bad = recipe.parent / "data" / "b.jsonl"
    write(bad, 2000, '{"query": "no end\n')
    with pytest.raises(DataError, match=r"b\.jsonl:2001"):
        prepare(recipe, "root")
    bad.unlink()
    assert digests(prepare(recipe, "root")) == digests(prepare(recipe, "fresh"))
