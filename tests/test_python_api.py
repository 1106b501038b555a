"""`import f2llm_ray`: vectors as sentence-transformers gives them, near-duplicates of any table, and runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray

import f2llm_ray as f2
from f2llm_ray.base.errors import ArgumentError, DataError, RecipeError, RunError
from f2llm_ray.engine.text_engine import calibrate, save_calibration
from f2llm_ray.run.folder import Folder
from tests.corpus import write_corpus, write_recipe
from tests.encoders import encoder_folder
from tests.tiny import LINES, tiny_model

PROMPT = "Instruct: Find the passage that answers.\nQuery: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("api") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> f2.Model:
    return f2.load(folder)


@pytest.fixture(scope="module")
def other(folder: Path) -> object:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def test_the_import_is_light() -> None:
    heavy = "{'ray', 'torch', 'numpy', 'pydantic', 'pyarrow', 'transformers'}"
    code = f"import sys, f2llm_ray; assert not {heavy} & set(sys.modules); assert 'load' in dir(f2llm_ray)"
    subprocess.run([sys.executable, "-c", code], check=True)
    rooms = {path.stem for path in Path(f2.__file__).parent.iterdir()}
    assert not rooms & set(f2.__all__), "a room would take the place of the call"
    assert all(getattr(f2, name).__module__.startswith("f2llm_ray.api.") for name in f2.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = f2.nothing


@pytest.mark.parametrize("texts", [LINES[0], LINES, [LINES[1]]], ids=["text", "list", "list of one"])
@pytest.mark.parametrize("prompt_name", [None, "query", "document"])
def test_encode_is_that_of_sentence_transformers(
    model: f2.Model, other: object, texts: str | list[str], prompt_name: str | None
) -> None:
    ours, theirs = model.encode(texts, prompt_name), other.encode(texts, prompt_name=prompt_name)
    assert ours.shape == theirs.shape
    assert ours.ndim == (1 if isinstance(texts, str) else 2)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_facts_are_those_of_sentence_transformers(model: f2.Model, other: object) -> None:
    assert model.dims == (8, 16, 32)
    assert model.prompts == other.prompts == {"query": PROMPT, "document": ""}
    assert model.default_prompt_name is other.default_prompt_name is None
    assert model.max_tokens == other.max_seq_length
    a, b = model.encode(LINES), model.encode(LINES[:2])
    np.testing.assert_allclose(model.similarity(a, b), other.similarity(a, b).numpy(), atol=1e-6)
    assert model.similarity(a[0], b[0]).shape == (1, 1)


def test_a_default_prompt_of_a_folder_counts(tmp_path: Path) -> None:
    import json

    from sentence_transformers import SentenceTransformer

    folder = encoder_folder(
        tmp_path / "e", "bert", prompts={"query": "query: ", "passage": "passage: ", "topic": "t "}
    )
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({**settings, "default_prompt_name": "topic"})
    )
    model, other = f2.load(folder), SentenceTransformer(str(folder), device="cpu")
    assert model.default_prompt_name == "topic"
    for name in (None, "passage", "query"):
        np.testing.assert_allclose(model.encode(LINES, name), other.encode(LINES, prompt_name=name), atol=1e-5)
    np.testing.assert_allclose(model.encode("x", prompt=""), other.encode("x", prompt=""), atol=1e-5)


def test_dims_and_types(folder: Path, tmp_path: Path) -> None:
    plain = f2.load(folder)
    whole = plain.encode(LINES)
    cut = plain.encode(LINES, dim=16)
    np.testing.assert_allclose(
        cut, whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True), atol=1e-6
    )
    assert plain.encode(LINES, dtype="float16").dtype == np.float16
    np.testing.assert_array_equal(plain.encode(LINES, dtype="ubinary"), np.packbits(whole > 0, axis=-1))
    assert plain.encode([]).shape == (0, 32)
    with pytest.raises(ArgumentError, match="no int8 ranges"):
        plain.encode(LINES, dtype="int8")
    ready = tiny_model(tmp_path / "ready")
    save_calibration(Folder.at(str(ready)), calibrate(plain._engine, plain._engine.tokenize(LINES)))  # noqa: SLF001
    assert f2.load(ready).encode(LINES[0], dtype="int8").dtype == np.int8


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"texts": ["a", 3]}, r"texts\[1\]: found int"),
        ({"texts": None}, r"texts: found NoneType, expected a text or a list of texts"),
        ({"texts": "a", "prompt_name": "queri"}, "found 'queri', expected one of query, document"),
        ({"texts": "a", "dim": 12}, "found 12, expected one of 8, 16, 32"),
        ({"texts": "a", "dtype": "int4"}, "found 'int4', expected float32"),
    ],
)
def test_what_cannot_be_encoded_is_refused(model: f2.Model, arguments: dict[str, object], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        model.encode(**arguments)
    with pytest.raises(ArgumentError, match="found uint8 vectors"):
        model.similarity(model.encode("a", dtype="ubinary"), model.encode("a", dtype="ubinary"))
    with pytest.raises(RunError, match="not a model folder"):
        f2.load("nowhere")


# Near-duplicates.


def texts_of(count: int) -> list[str]:
    words = [f"word{number}" for number in range(400)]
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(words, 30)) for _ in range(count)]


def planted() -> tuple[pa.Table, list[tuple[int, int]]]:
    """Rows of which some are copies of an earlier one, exact or with a word changed, and (row, kept) of each."""
    texts = texts_of(60)
    pairs = [(40, 3), (41, 3), (50, 7), (59, 12)]
    for row, first in pairs:
        words = texts[first].split()
        words[-1] = "changed" if row != 41 else words[-1]
        texts[row] = " ".join(words)
    table = pa.table({"number": range(60), "text": texts, "other": texts_of(60)[::-1]})
    return table, pairs


@pytest.mark.parametrize("kind", ["table", "frame", "dataset"])
def test_planted_duplicates_are_found_in_every_kind_of_table(ray_here: None, kind: str) -> None:
    del ray_here
    table, pairs = planted()
    data = {"table": lambda: table, "frame": table.to_pandas, "dataset": lambda: dataset_of(table)}[kind]()
    found = f2.dedup(data)
    expected = sorted([*pairs, *{(first, first) for _, first in pairs}], key=lambda pair: pair[::-1])
    assert list(zip(*found.clusters.to_pydict().values(), strict=True)) == expected
    assert (found.rows, found.dropped) == (60, 4)
    kept = {
        "table": lambda t: t,
        "frame": pa.Table.from_pandas,
        "dataset": lambda d: pa.concat_tables(ray.get(d.to_arrow_refs())),
    }
    numbers = kept[kind](found.kept)["number"].to_pylist()
    assert numbers == [row for row in range(60) if row not in dict(pairs)]
    assert isinstance(found.kept, type(data))


def dataset_of(table: pa.Table) -> ray.data.Dataset:
    import ray.data

    return ray.data.from_arrow([table.slice(start, 13) for start in range(0, 60, 13)])


def test_rows_must_be_alike_in_every_column_named(ray_here: None) -> None:
    del ray_here
    table, pairs = planted()
    assert f2.dedup(table, ["text", "other"]).dropped == 0
    both = table.set_column(2, "other", table["text"])
    assert f2.dedup(both, ["text", "other"]).dropped == len(pairs)
    assert f2.dedup(table.slice(0, 0)).rows == 0


def test_what_cannot_be_compared_is_refused(ray_here: None) -> None:
    del ray_here
    with pytest.raises(DataError, match=r"row 1 of block 0, column 'text': found None"):
        f2.dedup(pa.table({"text": ["a", None]}))
    with pytest.raises(DataError, match=r"column 'body': not there; the columns are \['text'\]"):
        f2.dedup(pd.DataFrame({"text": ["a"]}), "body")
    with pytest.raises(ArgumentError, match="found list"):
        f2.dedup(["a"])


# Runs.


def test_a_run_gives_its_models_and_scores(ray_here: None, tmp_path: Path) -> None:
    """Without a training, which the tests of the pipeline have: the backbone and a model pruned of it."""
    del ray_here
    recipe = write_corpus(tmp_path)
    del recipe["distill"]
    recipe |= {"stages": {}, "prune": {**recipe["prune"], "model": "untrained"}}
    with pytest.raises(RecipeError, match="unknown key"):
        f2.run_recipe(recipe, tmp_path / "root", data={"max_token": 3})
    assert not (tmp_path / "root").exists()
    result = f2.run_recipe(recipe, tmp_path / "root", sources={"labels": None, "clusters": None})
    assert list(result.models) == ["untrained", "pruned"]
    assert Path(result.report_html).is_file()
    assert result.load().dims[-1] == 24
    assert result.load("untrained").encode("x").shape == (32,)
    with pytest.raises(ArgumentError, match="found 'gone', expected one of untrained, pruned"):
        result.load("gone")
    score = result.report["models"][1]["scores"]["held"]["24"]["ndcg@10"]
    shown = result._repr_html_()
    assert f"<td>{score:.3f}</td>" in shown
    assert "<th>held, ndcg@10</th>" in shown
    assert f"{score:.3f}" in str(result)
    measured = f2.evaluate_model(result.load(), recipe, tmp_path / "root")
    assert measured["held"]["24"]["ndcg@10"] == pytest.approx(score, abs=1e-6)
    with pytest.raises(ArgumentError, match=r"has no evaluation\.sets"):
        f2.evaluate_model(result.load(), recipe, tmp_path / "root", evaluation=None)


def test_the_examples_of_the_page_run(ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del ray_here
    page = (
        (Path(__file__).parent.parent / "docs" / "python.md")
        .read_text(encoding="utf-8")
        .replace("<hash>", "1a2b3c4d")
    )
    recipe = write_corpus(tmp_path)
    del recipe["distill"]
    write_recipe(tmp_path, recipe | {"stages": {}, "prune": {**recipe["prune"], "model": "untrained"}})
    tiny_model(tmp_path / "runs" / "ours" / "trained-1a2b3c4d" / "model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)  # noqa: S102 - our own page
    assert names["scores"].shape == (2, 3)
    assert names["signs"].shape == (1, 4)
    assert names["found"].dropped == 1
    assert names["found"].clusters.to_pylist() == [{"row": 0, "kept": 0}, {"row": 2, "kept": 0}]
