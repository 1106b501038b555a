"""Bulk embedding on real Ray Data: rows are the engine's, shards are made once, refusals name the place."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from pyarrow import csv
from pyarrow import parquet as pq

from f2llm_ray.errors import DataError, RunError
from f2llm_ray.run import Folder
from f2llm_ray.serve.bulk import Job, ShardWriter, run
from f2llm_ray.serve.engine import Engine
from f2llm_ray.serve.inputs import find_files, plan
from tests.tiny import MAX_TOKENS, tiny_model

JOB = Path(__file__).parents[2] / "jobs" / "embed.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


def texts_of(rows: int) -> list[str]:
    """Every third text comes again, some are long, some are not Latin."""
    return [f"猫 {i // 3 if i % 3 == 0 else i} " + "the cat " * (i % 50) for i in range(rows)]


def vectors_of(table: pa.Table) -> np.ndarray[Any, Any]:
    column = table["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(table), column.type.list_size)


def here(job: Job, *, unit: int = 0) -> pa.Table:
    """One unit's shard, written in this process by the code that the actors run."""
    source, output = Folder.at(job.input), Folder.at(job.output)
    output.create()
    chosen = list(plan(source, find_files(source)))[unit]
    ShardWriter(job).write(chosen)
    return pq.read_table(f"{output.path}/{chosen.shard}")


@pytest.mark.usefixtures("cluster")
def test_a_run_its_resume_and_its_refusals(tmp_path: Path, folder: Path) -> None:
    texts = texts_of(250)
    ids = [f"doc-{i}" for i in range(250)]
    source, output = tmp_path / "in", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    pq.write_table(pa.table({"id": ids[:200], "text": texts[:200]}), source / "a.parquet", row_group_size=80)
    rows = zip(texts[200:], ids[200:], strict=True)
    lines = [json.dumps({"text": text, "id": name, "more": [1]}) for text, name in rows]
    broken = [*lines[:3], json.dumps({"text": "", "id": "doc"}).ljust(len(lines[3])), *lines[4:]]
    jsonl = source / "sub" / "b.jsonl"
    jsonl.write_text("\n".join(broken), encoding="utf-8")
    job = Job(
        model=str(folder),
        input=str(source),
        column="text",
        output=str(output),
        id_column="id",
        dimensions=16,
        prompt_name="query",
        batch_rows=32,
    )

    # A bad row stops its own shard only; there is no manifest then, and no half of a shard.
    with pytest.raises(DataError) as caught:
        run(job, workers=1)
    assert str(caught.value) == f"{jsonl}: row 3 (counted from 0) has no text in column 'text'"
    made = sorted(output.glob("*.parquet"))
    assert sorted(path.name for path in output.iterdir()) == ["settings.json", *(path.name for path in made)]
    assert [len(pq.read_table(shard)) for shard in made] == [80, 80, 40]

    # The next run makes what is not there, and nothing else.
    made[1].unlink()
    times = {shard: shard.stat().st_mtime_ns for shard in made if shard.exists()}
    jsonl.write_text("\n".join(lines), encoding="utf-8")
    manifest = run(job, workers=1)
    assert {shard: shard.stat().st_mtime_ns for shard in times} == times
    assert (manifest["shards"], manifest["shards_skipped"]) == (4, 2)
    assert (manifest["rows"], manifest["embedded_now"]["rows"]) == (250, 130)
    groups = [texts[:80], texts[80:160], texts[160:200], texts[200:]]
    assert manifest["embedded"] == sum(len(set(group)) for group in groups) < 250
    assert manifest["cut"] > 0
    on_disk = json.loads((output / "manifest.json").read_text())
    assert (on_disk["rows"], on_disk["dimensions"], on_disk["prompt_name"]) == (250, 16, "query")

    engine = Engine(folder)
    table = pa.concat_tables([pq.read_table(shard) for shard in sorted(output.glob("*.parquet"))])
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 16)
    assert table["id"].to_pylist() == ids
    expected = engine.embed(texts, prompt=engine.info.prompts["query"], dim=16)
    np.testing.assert_allclose(vectors_of(table), expected, atol=1e-5)
    assert run(job)["embedded_now"]["rows"] == 0

    # Another setting, input or model must not mix with what is there.
    for change, message in (
        ({"dimensions": 8}, r"dimensions \(was 16, now 8\)"),
        ({"prompt_name": None}, "prompt_name"),
        ({"model": str(tiny_model(tmp_path / "other", hidden=64))}, "model_fingerprint"),
    ):
        with pytest.raises(RunError, match=message):
            run(replace(job, **change))
    (source / "c.jsonl").write_text('{"text": "new"}')
    with pytest.raises(RunError, match="files"):
        run(job)


def test_row_numbers_stand_in_for_ids(tmp_path: Path, folder: Path) -> None:
    texts = texts_of(10)
    pq.write_table(pa.table({"t": texts}), tmp_path / "a.parquet", row_group_size=6)
    table = here(
        Job(model=str(folder), input=str(tmp_path / "a.parquet"), column="t", output=str(tmp_path / "o")), unit=1
    )
    assert table["id"].to_pylist() == [6, 7, 8, 9]
    assert set(table["file"].to_pylist()) == {"a.parquet"}
    np.testing.assert_allclose(vectors_of(table), Engine(folder).embed(texts[6:]), atol=1e-5)


def test_equal_texts_go_through_the_model_once(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a", "b", "a", "c", "b", "a"]
    pq.write_table(pa.table({"t": texts}), tmp_path / "a.parquet")
    seen: list[int] = []
    embed_tokens = Engine.embed_tokens

    def watched(self: Engine, tokens: Any, **kwargs: Any) -> Any:
        seen.append(len(tokens))
        return embed_tokens(self, tokens, **kwargs)

    monkeypatch.setattr(Engine, "embed_tokens", watched)
    job = Job(
        model=str(folder), input=str(tmp_path / "a.parquet"), column="t", output=str(tmp_path / "o"), batch_rows=2
    )
    table = here(job)
    assert sum(seen) == 3
    np.testing.assert_allclose(vectors_of(table), Engine(folder).embed(texts), atol=1e-5)


def test_text_stays_text(tmp_path: Path, folder: Path) -> None:
    dates = ["2020-01-01", "2021-02-03"]
    (tmp_path / "dates.jsonl").write_text("\n".join(json.dumps({"t": date}) for date in dates))
    csv.write_csv(pa.table({"t": ["1", "line\nbreak, and comma"], "id": [7, 8]}), tmp_path / "numbers.csv")
    engine = Engine(folder)
    lines = here(
        Job(model=str(folder), input=str(tmp_path / "dates.jsonl"), column="t", output=str(tmp_path / "o"))
    )
    np.testing.assert_allclose(vectors_of(lines), engine.embed(dates), atol=1e-5)
    job = Job(
        model=str(folder),
        input=str(tmp_path / "numbers.csv"),
        column="t",
        output=str(tmp_path / "p"),
        id_column="id",
    )
    table = here(job)
    assert table["id"].to_pylist() == [7, 8]
    np.testing.assert_allclose(vectors_of(table), engine.embed(["1", "line\nbreak, and comma"]), atol=1e-5)


def test_long_texts_are_cut_and_counted(tmp_path: Path, folder: Path) -> None:
    long = "the cat " * 500
    pq.write_table(pa.table({"t": [long, "short"]}), tmp_path / "a.parquet")
    job = Job(model=str(folder), input=str(tmp_path / "a.parquet"), column="t", output=str(tmp_path / "o"))
    table = here(job)
    np.testing.assert_allclose(vectors_of(table), Engine(folder).embed([long, "short"]), atol=1e-5)
    counts = json.loads(pq.read_metadata(tmp_path / "o" / "shard-000000.parquet").metadata[b"f2llm"])
    assert counts["cut"] == 1
    assert counts["tokens"] > MAX_TOKENS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"t": "a"}\n{"t": null}\n', r"a\.jsonl: row 1 .* has no text in column 't'"),
        ("a.jsonl", b'{"t": "a"}\n{"t": 1}\n', r"a\.jsonl: cannot be read: "),
        ("a.jsonl", b'{"t": "a"}\n{"t": \n', r"a\.jsonl: cannot be read: "),
        ("a.csv", b"t,id\n\xff\xfe,1\n", r"a\.csv: cannot be read: "),
        ("a.csv", b"u,id\na,1\n", r"a\.csv: it has no column 't'"),
        ("a.parquet", b"PAR1 not", r"a\.parquet: cannot be read: "),
    ],
)
def test_bad_files_are_named(tmp_path: Path, folder: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        here(Job(model=str(folder), input=str(tmp_path / name), column="t", output=str(tmp_path / "o")))


def test_refusals_before_any_work(tmp_path: Path, folder: Path) -> None:
    pq.write_table(pa.table({"t": ["a"], "n": [1]}), tmp_path / "a.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "taken" / "x.parquet")
    fine = {
        "model": str(folder),
        "input": str(tmp_path / "a.parquet"),
        "column": "t",
        "output": str(tmp_path / "o"),
    }
    for change, message in (
        ({"dimensions": 9}, "not trained for 9; allowed: 8, 16, 32"),
        ({"prompt_name": "no"}, "it has: query"),
        ({"model": str(tmp_path)}, "not a model folder"),
        ({"input": str(tmp_path / "no")}, "no .parquet, .jsonl, .csv file there"),
        ({"input": str(tmp_path / "empty")}, "no .parquet, .jsonl, .csv file there"),
        ({"input": str(tmp_path), "output": str(tmp_path / "o")}, "lies within the input"),
        ({"output": str(tmp_path / "taken")}, "parquet files of something else"),
        ({"batch_rows": 0}, "at least 1 is needed"),
    ):
        with pytest.raises(RunError, match=message):
            run(Job(**{**fine, **change}))
    with pytest.raises(DataError, match="column 'n' holds int64, expected strings"):
        here(Job(**{**fine, "column": "n"}))
    with pytest.raises(DataError, match="it has no column 'id'"):
        here(Job(**fine, id_column="id"))


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    arguments = [
        "--model",
        str(tmp_path),
        "--input",
        str(tmp_path),
        "--column",
        "t",
        "--output",
        str(tmp_path / "o"),
    ]
    done = subprocess.run([sys.executable, str(JOB), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
