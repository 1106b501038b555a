"""Bulk embedding on real Ray Data: rows are the engine's, shards are made once, refusals name the place."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv
from pyarrow import parquet as pq

from f2llm_ray.base.errors import DataError, RunError
from f2llm_ray.commands.embed import told
from f2llm_ray.data.reading import tables
from f2llm_ray.data.reading.paths import find_files
from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.text_engine import calibrate, load_calibration, save_calibration
from f2llm_ray.model.dims import quantize_vectors
from f2llm_ray.run.folder import Folder
from f2llm_ray.serve.bulk import run, survey
from f2llm_ray.serve.inputs import UnitReader, units_of
from f2llm_ray.serve.shards import DTYPES, Dtype, EmbedJob, ShardWriter
from tests.tiny import MAX_TOKENS, tiny_model

JOB = Path(__file__).parents[2] / "jobs" / "embed.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def texts_of(rows: int) -> list[str]:
    """Every third text comes again, some are long, some are not Latin."""
    return [f"猫 {i // 3 if i % 3 == 0 else i} " + "the cat " * (i % 50) for i in range(rows)]


def vectors_of(table: pa.Table) -> np.ndarray[Any, Any]:
    column = table["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(table), column.type.list_size)


def here(job: EmbedJob, *, unit: int = 0) -> pa.Table:
    """One unit's shard, written in this process by the code that the actors run."""
    output = Folder.at(job.output)
    output.create()
    files = find_files(job.input, tables.SUFFIXES, job.input)
    chosen = units_of(files, {name: number for number, name in enumerate(files)}, job.shard_rows)[unit]
    ShardWriter(job).write(chosen)
    return pq.read_table(f"{output.path}/{chosen.shard}")


@pytest.mark.usefixtures("ray_here")
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
    job = EmbedJob(
        model=str(folder),
        input=str(source),
        column="text",
        output=str(output),
        id_column="id",
        dimensions=16,
        prompt_name="query",
        shard_rows=100,
        batch_rows=32,
    )

    # A bad row stops its own shard only; there is no manifest then, and no half of a shard.
    with pytest.raises(DataError) as caught:
        run(job, workers=1)
    assert str(caught.value) == f"{jsonl}:4: text: found str '', expected text"
    made = sorted(output.glob("*.parquet"))
    assert sorted(path.name for path in output.iterdir()) == ["_settings.json", *(path.name for path in made)]
    assert [len(pq.read_table(shard)) for shard in made] == [80, 80, 40]

    # The next run makes what is not there, and nothing else; what a killed worker left goes.
    (output / ".shard-00000-000001.parquet.0a1b").write_bytes(b"PAR1")
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
    assert not list(output.glob(".shard-*"))
    on_disk = json.loads((output / "_manifest.json").read_text())
    assert (on_disk["rows"], on_disk["dimensions"], on_disk["prompt_name"]) == (250, 16, "query")

    engine = Engine(folder)
    table = pa.concat_tables([pq.read_table(shard) for shard in sorted(output.glob("*.parquet"))])
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 16)
    assert table["id"].to_pylist() == ids
    expected = engine.embed(texts, prompt=engine.info.prompts["query"], dim=16)
    np.testing.assert_allclose(vectors_of(table), expected, atol=1e-5)
    again = run(job)
    assert again["embedded_now"]["rows"] == 0
    assert told(again).startswith(f"{output}: nothing to do: 4 shards were there; 250 rows in all; ")
    assert told(manifest).startswith(f"{output}: 130 rows embedded in ")
    assert "; 2 of 4 shards there before; 250 rows in all; " in told(manifest)

    # Another setting, input or model must not mix with what is there.
    for change, message in (
        ({"dimensions": 8}, r"dimensions \(was 16, now 8\)"),
        ({"prompt_name": None}, "prompt_name"),
        ({"dtype": "float16"}, r'dtype \(was "float32", now "float16"\)'),
        ({"model": str(tiny_model(tmp_path / "other", hidden=64))}, "model_fingerprint"),
    ):
        with pytest.raises(RunError, match=message):
            run(replace(job, **change))


@pytest.mark.usefixtures("ray_here")
def test_files_that_change_cost_their_own_shards(tmp_path: Path, folder: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    contents: dict[str, list[str | None]] = {"a": ["one", None, "two"], "b": ["three", "four"], "c": ["five"]}

    def write(name: str) -> None:
        pq.write_table(pa.table({"t": pa.array(contents[name], pa.string())}), source / f"{name}.parquet")

    for name in "ab":
        write(name)
    job = EmbedJob(model=str(folder), input=str(source), column="t", output=str(output))
    with pytest.raises(DataError, match=r"a\.parquet: row 1 \(counted from 0\): t: found null, expected text"):
        run(job, workers=1)
    (of_b,) = output.glob("*.parquet")
    made = of_b.stat().st_mtime_ns

    skipped = run(replace(job, on_bad_row="skip"), workers=1)
    assert (skipped["rows"], skipped["skipped"], skipped["shards_skipped"]) == (4, 1, 1)
    table = pq.read_table(output)
    assert sorted(zip(table["file"].to_pylist(), table["id"].to_pylist(), strict=True))[:2] == [
        ("a.parquet", 0),
        ("a.parquet", 2),
    ], "rows keep their true numbers"

    contents["a"][1] = "mended"
    for name in "ac":
        write(name)
    mended = run(job, workers=1)
    assert (mended["rows"], mended["skipped"], mended["shards_removed"]) == (6, 0, 1)
    assert mended["embedded_now"]["rows"] == 4
    assert of_b.stat().st_mtime_ns == made
    (source / "b.parquet").rename(source / "z.parquet")
    (source / "a.parquet").unlink()
    left = run(job, workers=1)
    assert (left["rows"], left["shards"], left["shards_removed"]) == (3, 2, 2)
    table = pq.read_table(output)
    texts = {"z.parquet": contents["b"], "c.parquet": contents["c"]}
    expected = [
        texts[file][row] for file, row in zip(*(table[n].to_pylist() for n in ("file", "id")), strict=True)
    ]
    np.testing.assert_allclose(vectors_of(table), Engine(folder).embed(expected), atol=1e-5)


def test_row_numbers_stand_in_for_ids(tmp_path: Path, folder: Path) -> None:
    texts = texts_of(10)
    pq.write_table(pa.table({"t": texts}), tmp_path / "a.parquet", row_group_size=6)
    table = here(
        EmbedJob(model=str(folder), input=str(tmp_path / "a.parquet"), column="t", output=str(tmp_path / "o")),
        unit=1,
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
    job = EmbedJob(
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
        EmbedJob(model=str(folder), input=str(tmp_path / "dates.jsonl"), column="t", output=str(tmp_path / "o"))
    )
    np.testing.assert_allclose(vectors_of(lines), engine.embed(dates), atol=1e-5)
    job = EmbedJob(
        model=str(folder),
        input=str(tmp_path / "numbers.csv"),
        column="t",
        output=str(tmp_path / "p"),
        id_column="id",
    )
    table = here(job)
    assert table["id"].to_pylist() == [7, 8]
    np.testing.assert_allclose(vectors_of(table), engine.embed(["1", "line\nbreak, and comma"]), atol=1e-5)
    (tmp_path / "tabs.tsv").write_text('t\tid\n"1, 2\tx\n3\t7\n', encoding="utf-8-sig")
    table = here(replace(job, input=str(tmp_path / "tabs.tsv"), output=str(tmp_path / "q"), keep=("t",)))
    assert table.select(["id", "t"]).to_pylist() == [{"id": "x", "t": '"1, 2'}, {"id": "7", "t": "3"}]


def test_long_texts_are_cut_and_counted(tmp_path: Path, folder: Path) -> None:
    long = "the cat " * 500
    pq.write_table(pa.table({"t": [long, "short"]}), tmp_path / "a.parquet")
    job = EmbedJob(model=str(folder), input=str(tmp_path / "a.parquet"), column="t", output=str(tmp_path / "o"))
    table = here(job)
    np.testing.assert_allclose(vectors_of(table), Engine(folder).embed([long, "short"]), atol=1e-5)
    counts = json.loads(pq.read_metadata(tmp_path / "o" / "shard-00000-000000.parquet").metadata[b"f2llm"])
    assert counts["cut"] == 1
    assert counts["tokens"] > MAX_TOKENS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"t": "a"}\n{"t": null}\n', r"a\.jsonl:2: t: found null, expected text"),
        ("a.jsonl", b'{"t": "a"}\n{"t": 1}\n', r"a\.jsonl:2: t: found int 1, expected text"),
        ("a.jsonl", b'{"t": "a"}\n{"t": \n', r"a\.jsonl:2: found a line that is not JSON"),
        ("a.csv", b"t,id\n\xff\xfe,1\n", r"a\.csv:2: found byte 0xff at byte 1 of the line, expected UTF-8"),
        ("a.csv", b"u,id\na,1\n", r"a\.csv: no column 't'; the columns are \['u', 'id'\]"),
        ("a.parquet", b"PAR1 not", r"a\.parquet: found a damaged file or another format, expected Parquet"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, folder: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        here(EmbedJob(model=str(folder), input=str(tmp_path / name), column="t", output=str(tmp_path / "o")))


def test_refusals_before_any_work(tmp_path: Path, folder: Path) -> None:
    pq.write_table(pa.table({"t": ["a"], "n": [1]}), tmp_path / "a.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "_settings.json").write_text("[]")
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
        ({"input": str(tmp_path), "output": str(tmp_path / "o")}, "lies within the input"),
        ({"output": str(tmp_path / "taken")}, "parquet files of something else"),
        ({"output": str(tmp_path / "a.parquet")}, r"a\.parquet: a file, expected a folder"),
        ({"output": str(tmp_path / "odd")}, "_settings.json: not the settings of an output"),
        ({"batch_rows": 0}, "at least 1 is needed"),
        ({"shard_rows": 0}, "at least 1 is needed"),
        ({"dtype": "int8"}, r"int8 needs .*calibration\.safetensors"),
        ({"dtype": "int4"}, "'int4' is not one of float32, float16, int8, binary, ubinary"),
        ({"keep": ("n", "file")}, "'file' is a column of the shards already"),
        ({"keep": ("n", "n")}, "'n' is a column of the shards already"),
    ):
        with pytest.raises(RunError, match=message):
            run(EmbedJob(**{**fine, **change}))
    with pytest.raises(RunError, match="workers: 0, at least 1 is needed"):
        run(EmbedJob(**fine), workers=0)
    for name in ("no", "empty"):
        with pytest.raises(
            DataError, match=rf"{name}: found no file, expected .* \.parquet, \.jsonl, \.csv or \.tsv"
        ):
            run(EmbedJob(**{**fine, "input": str(tmp_path / name)}))
    with pytest.raises(DataError, match="column 'n': found int64, expected text"):
        here(EmbedJob(**{**fine, "column": "n"}))
    with pytest.raises(DataError, match="no column 'id'; the columns are"):
        here(EmbedJob(**fine, id_column="id"))
    with pytest.raises(DataError, match="no column 'more'; the columns are"):
        here(EmbedJob(**fine, keep=("more",)))


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


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("end", ["", "\n"])
def test_large_files_are_shared_out_by_rows(
    tmp_path: Path, block: int, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row is in one unit, and has one number, whatever the blocks in which its file is read."""
    monkeypatch.setattr(tables, "READ_BYTES", block)
    rows = [{"t": f"text {i} 猫", "n": i} for i in range(23)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + end
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet", row_group_size=15)
    (tmp_path / "c.jsonl").write_text("")
    reader = UnitReader("t", None, ["n"])
    files = find_files(str(tmp_path), tables.SUFFIXES, "input")
    units = units_of(files, {name: number for number, name in enumerate(files)}, 6)
    places = [(0, place) for place in range(4)] + [(1, place) for place in range(5)]
    assert [unit.shard for unit in units] == [f"shard-{file:05d}-{place:06d}.parquet" for file, place in places]
    read = [reader.read(unit)[:2] for unit in units]
    assert [len(texts) for texts, _ in read] == [6, 6, 6, 5, 6, 6, 3, 6, 2]
    for part in (slice(0, 4), slice(4, 9)):
        assert [text for texts, _ in read[part] for text in texts.to_pylist()] == [row["t"] for row in rows]
        for name in ("id", "n"):
            assert [n for _, columns in read[part] for n in columns[name].to_pylist()] == list(range(23))


def test_blank_lines_are_no_rows_and_keep_the_numbers_of_the_others(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"t": "a"}\n{"t": "b"}\n\n\n\n{"t": ""}\n')
    job = EmbedJob(
        model=str(folder), input=str(tmp_path / "*.jsonl"), column="t", output=str(tmp_path / "o"), shard_rows=2
    )
    assert [len(here(job, unit=unit)) for unit in (0, 1)] == [2, 0]
    with pytest.raises(DataError, match=r"a\.jsonl:6: t: found str '', expected text"):
        here(job, unit=2)


def test_columns_go_along_and_keep_their_type(tmp_path: Path, folder: Path) -> None:
    rows: list[dict[str, Any]] = [{"t": f"text {i}", "more": None, "tags": ["a"] * i} for i in range(4)]
    rows[3]["more"] = "here"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = EmbedJob(
        model=str(folder),
        input=str(tmp_path / "a.jsonl"),
        column="t",
        output=str(tmp_path / "o"),
        keep=("t", "more", "tags"),
        shard_rows=3,
    )
    table = pa.concat_tables([here(job, unit=0), here(job, unit=1)])
    assert table.column_names == ["file", "id", "t", "more", "tags", "embedding"]
    assert table.select(["t", "more", "tags"]).to_pylist() == rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_holds_the_engines_vectors(tmp_path: Path, folder: Path, dtype: Dtype) -> None:
    texts = texts_of(40)
    engine = Engine(folder)
    model = tiny_model(tmp_path / "model")
    save_calibration(Folder.at(str(model)), calibrate(engine, engine.tokenize(texts, max_tokens=MAX_TOKENS)))
    pq.write_table(pa.table({"t": texts}), tmp_path / "a.parquet")
    job = EmbedJob(
        model=str(model), input=str(tmp_path / "a.parquet"), column="t", output=str(tmp_path / "o"), dtype=dtype
    )
    found = vectors_of(here(replace(job, dimensions=16)))
    vectors = engine.embed(texts, dim=16)
    if dtype.startswith("float"):
        assert found.dtype == dtype
        np.testing.assert_allclose(found, vectors, atol=1e-3 if dtype == "float16" else 1e-5)
        return
    calibration = load_calibration(model)
    assert calibration is not None
    expected = quantize_vectors(vectors, dtype, calibration.ranges[16])  # type: ignore[arg-type]
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    # A value on the edge of a step, or of a sign, may fall to either side with the batch it travelled in.
    apart = np.abs(found.astype(int) - expected.astype(int)) if dtype == "int8" else found != expected
    assert np.mean(apart) < 0.01
    assert dtype != "int8" or apart.max() <= 1


def test_stores_read_the_shards(tmp_path: Path, folder: Path) -> None:
    """The nearest neighbours that FAISS and LanceDB find in the files are those of the engine's vectors."""
    faiss, lancedb = pytest.importorskip("faiss"), pytest.importorskip("lancedb")
    texts = [f"text {i} " + "the cat " * (i % 7) for i in range(60)]
    pq.write_table(pa.table({"t": texts}), tmp_path / "a.parquet")
    jobs = {
        dtype: EmbedJob(
            model=str(folder),
            input=str(tmp_path / "a.parquet"),
            column="t",
            output=str(tmp_path / dtype),
            dtype=dtype,
            keep=("t",),
        )
        for dtype in ("float32", "float16", "ubinary")
    }
    tables = {dtype: here(job) for dtype, job in jobs.items()}
    vectors = Engine(folder).embed(texts)
    best = np.argsort(-vectors @ vectors.T, axis=1)[:, :3]

    flat = faiss.IndexFlatIP(32)
    flat.add(vectors_of(tables["float32"]))
    assert (flat.search(vectors, 3)[1][:, 0] == np.arange(60)).all()
    assert np.mean(flat.search(vectors, 3)[1] == best) > 0.99
    bits = faiss.IndexBinaryFlat(32)
    bits.add(vectors_of(tables["ubinary"]))
    assert (bits.search(np.packbits(vectors > 0, axis=1), 1)[0] == 0).all()

    store = lancedb.connect(tmp_path / "lance")
    for dtype in ("float32", "float16"):
        table = store.create_table(dtype, data=tables[dtype])
        found = table.search(vectors[7], vector_column_name="embedding").metric("cosine").limit(3).to_list()
        assert [row["t"] for row in found] == [texts[i] for i in best[7]], dtype


@pytest.mark.slow
def test_a_killed_job_goes_on(tmp_path: Path, folder: Path) -> None:
    texts = texts_of(6000)
    pq.write_table(pa.table({"t": texts}), tmp_path / "a.parquet")
    output = tmp_path / "o"
    command = [sys.executable, str(JOB), "--model", str(folder), "--input", str(tmp_path / "a.parquet")]
    command += ["--column", "t", "--output", str(output), "--shard-rows", "200", "--batch-rows", "50"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as job:
        while not list(output.glob("*.parquet")):
            assert job.poll() is None
            time.sleep(0.02)
        job.kill()
    left = {shard: shard.stat().st_mtime_ns for shard in output.glob("*.parquet")}
    assert 0 < len(left) < 30
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(left)} of 30 shards were there; 6000 rows in all" in done.stdout
    assert {shard: shard.stat().st_mtime_ns for shard in left} == left
    table = pq.read_table(output)
    assert table["id"].to_pylist() == list(range(6000))
    np.testing.assert_allclose(vectors_of(table), Engine(folder).embed(texts), atol=1e-5)


def test_columns_are_looked_for_before_any_work_starts(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.csv").write_text("title,body\nOne,the first\n")
    fine = {
        "model": str(folder),
        "input": str(tmp_path / "a.csv"),
        "output": str(tmp_path / "o"),
        "column": "body",
    }
    assert len(survey(EmbedJob(**fine)).waiting) == 1
    for change in ({"column": "bodi"}, {"id_column": "bodi"}, {"keep": ("bodi",)}):
        with pytest.raises(
            DataError, match=r"no column 'bodi'; the columns are \['title', 'body'\]; did you mean 'body'"
        ):
            survey(EmbedJob(**{**fine, **change}))
