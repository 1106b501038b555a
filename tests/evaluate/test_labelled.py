"""Users' labelled tables: what is wrong is named; what is right is measured in a run and not trained on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from f2llm_ray.base.errors import DataError, F2LLMError, RecipeError, RunError
from f2llm_ray.data.decontaminate import make_screen
from f2llm_ray.data.settings import Decontamination
from f2llm_ray.engine.engine import Engine
from f2llm_ray.evaluate.differences import compare, table
from f2llm_ray.evaluate.tasks.registry import read_task, task_of
from f2llm_ray.evaluate.tasks.retrieval_set import RetrievalSet
from f2llm_ray.pipeline.compare import compare as compare_models
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.recipe.files import load_recipe, parse
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder
from tests.corpus import write_corpus, write_recipe
from tests.openai_server import openai_endpoint
from tests.tiny import tiny_model

Rows = list[dict[str, Any]]

TEXTS: Rows = [
    {"text": "one", "label": "odd", "language": "eng"},
    {"text": "two", "label": "even", "language": "eng"},
    {"text": "drei", "label": "odd", "language": "deu"},
    {"text": "vier", "label": "even", "language": "deu"},
]
GRADED: Rows = [
    {"text_a": "one", "text_b": "two", "score": 1, "lang": None},
    {"text_a": "one", "text_b": "uno", "score": 4.5, "lang": None},
]
BINARY: Rows = [{"text_a": "one", "text_b": "uno", "label": 1}, {"text_a": "one", "text_b": "two", "label": 0}]
BITEXT: Rows = [{"text_a": "uno", "text_b": "one", "language": "spa"}]
RANKED: Rows = [{"query": "which?", "positive": ["1"], "negative": ["2", "3"]}]
FILES: dict[str, Rows] = {
    "bitext": BITEXT,
    "classification": TEXTS,
    "clustering": TEXTS,
    "sts": GRADED,
    "pair_classification": BINARY,
    "reranking": RANKED,
}


def write(path: Path, rows: Rows) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix in {".csv", ".tsv"}:
        cells = [[json.dumps(v) if isinstance(v, list) else v for v in row.values()] for row in rows]
        form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file, **(form if path.suffix == ".tsv" else {})).writerows([list(rows[0]), *cells])
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def setting(entry: dict[str, Any]) -> Any:
    """The entry as a recipe's set."""
    recipe = {
        "name": "r",
        "sources": {"s": {"format": "jsonl", "paths": ["s"]}},
        "backbone": {"path": "b"},
        "stages": {"stage1": {"engine": {"precision": "fp32"}}},
        "evaluation": {"sets": {"mine": entry}},
    }
    return parse(Recipe, recipe, "r").evaluation.sets["mine"]


def read(folder: Path, kind: str, rows: Rows, train: Rows | None = None, suffix: str = "jsonl") -> Any:
    entry = {"kind": kind, "test": write(folder / f"test.{suffix}", rows)}
    if kind == "classification":
        entry["train"] = write(folder / f"train.{suffix}", TEXTS if train is None else train)
    return task_of("mine", setting(entry))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv", "tsv"])
@pytest.mark.parametrize("kind", FILES)
def test_a_users_table_becomes_a_task(kind: str, suffix: str, tmp_path: Path) -> None:
    task = read(tmp_path, kind, FILES[kind], suffix=suffix)
    assert (task.name, task.kind) == ("mine", kind)
    assert len(task.test) == len(FILES[kind])
    languages = [row.get("language") or "und" for row in FILES[kind]]
    assert task.languages() == languages


LONG = "a text that is long enough to have an n-gram of eight"


@pytest.mark.parametrize("kind", FILES)
def test_no_text_that_is_tested_may_be_trained_on(kind: str, tmp_path: Path) -> None:
    """Queries and labelled texts, short ones too; answers where they are long. Labels and negatives may be."""
    rows = FILES[kind]
    if kind == "reranking":
        rows = [{**RANKED[0], "positive": ["1", LONG], "negative": [f"not {LONG[::-1]}"]}]
    if kind == "bitext":
        rows = [*BITEXT, {"text_a": "largo", "text_b": LONG}]
    train = [{"text": "five", "label": "odd"}, {"text": "six", "label": "even"}]
    found = read(tmp_path, kind, rows, train)
    screen = make_screen({found.name: found.screened()}, Decontamination())
    assert screen is not None
    asked = {
        "bitext": ["uno"],
        "classification": ["one", "vier", "five", "six"],
        "clustering": ["one", "vier"],
        "sts": ["one", "uno"],
        "pair_classification": ["two", "uno"],
        "reranking": ["which?"],
    }[kind]
    assert (screen.find([text.upper() for text in asked]) == 0).all()
    if kind in {"bitext", "reranking"}:
        assert screen.find([LONG, "one", "1"]).tolist() == [0, -1, -1]
    assert (screen.find(["odd", "another text", f"not {LONG[::-1]}"]) == -1).all()


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("sts", [], "test.jsonl: no column text_a; found none"),
        ("bitext", [{"text_a": "x"}], r"test.jsonl: no column text_b; found \['text_a'\]"),
        ("bitext", [*BITEXT, {"text_a": 3, "text_b": "y"}], "test.jsonl:2: text_a: found int 3, expected text"),
        (
            "clustering",
            [{"text": "x", "label": 1.5}],
            "test.jsonl:1: label: found float 1.5, expected text or a whole number",
        ),
        ("clustering", TEXTS[:3], "test.jsonl: language 'deu': found 1 label, expected at least 2"),
        (
            "classification",
            [*TEXTS, {"text": "pi", "label": "no"}],
            r"test.jsonl: row 4 \(counted from 0\): found 'no' as label, .* the 2 of .*train",
        ),
        (
            "sts",
            [*GRADED, {**GRADED[0], "score": "high"}],
            "test.jsonl:3: score: found str 'high', expected a number",
        ),
        ("sts", [{**GRADED[0], "score": float("nan")}], "test.jsonl:1: score: found float nan, expected a number"),
        ("sts", GRADED[:1] * 2, "language 'und': found one score for all its pairs, expected at least 2"),
        (
            "pair_classification",
            [*BINARY, {**BINARY[0], "label": 2}],
            r"test.jsonl: row 2 \(counted from 0\): found 2 as label, expected 0 or 1",
        ),
        ("pair_classification", BINARY[:1], "language 'und': found only label 1, expected 0 and 1"),
        (
            "reranking",
            [{**RANKED[0], "positive": []}],
            r"test.jsonl:1: positive: found \[\], expected a list of text, at least one",
        ),
        (
            "reranking",
            [{**RANKED[0], "negative": 2}],
            "test.jsonl:1: negative: found int 2, expected text or a list of text",
        ),
        (
            "reranking",
            [{**RANKED[0], "negative": ["1"]}],
            r"test.jsonl: row 0 \(counted from 0\): found '1' in positive and in negative",
        ),
    ],
)
def test_what_is_wrong_with_a_table_is_named(kind: str, rows: Rows, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, kind, rows)


def test_what_is_wrong_with_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl: found 1 labels to fit on, expected at least 2"):
        read(tmp_path, "classification", TEXTS[:1], TEXTS[:1])
    for test, message in (
        ("t.txt", "t.txt: expected a .parquet, .jsonl, .csv or .tsv file"),
        ("t.jsonl", "no file t.jsonl"),
    ):
        with pytest.raises(F2LLMError, match=message):
            task_of("mine", setting({"kind": "sts", "test": str(tmp_path / test)}))
    empty = pa.table({"text_a": pa.array([], pa.string()), "text_b": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(DataError, match=r"empty\.parquet: found no rows, expected at least one"):
        task_of("mine", setting({"kind": "bitext", "test": str(tmp_path / "empty.parquet")}))
    (tmp_path / "set.json").write_text('{"kind": "poetry", "name": "n", "instruction": ""}')
    with pytest.raises(DataError, match="found kind 'poetry', expected retrieval or"):
        read_task(Folder.at(str(tmp_path)))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"kind": "sts", "tset": "t"},
            r"evaluation.sets.mine.tset: unknown key; did you mean test\?; `f2llm recipe explain evaluation.sets",
        ),
        ({"kind": "classification", "test": "t"}, "evaluation.sets.mine.train: Field required"),
        ({"folder": "f", "kind": "sts"}, "evaluation.sets.mine.kind: Input should be 'retrieval'; found 'sts'"),
        ({"kind": "poetry", "test": "t"}, "sets.mine: expected a folder or a source, or a test file and its kind"),
        ({"test": "t"}, "sets.mine: expected a folder or a source, or a test file and its kind"),
    ],
)
def test_an_entry_that_is_no_set_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        setting(entry)


def test_retrieval_is_the_kind_of_entries_without_one() -> None:
    assert setting({"folder": "f"}).kind == "retrieval"
    source = {"format": "jsonl", "paths": ["p"]}
    assert setting({"source": source}).kind == "retrieval"
    assert setting({"source": source, "kind": "bitext"}).kind == "bitext"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> tuple[Pipeline, Path]:
    """A run up to the evaluation of its untrained model, with sets of three kinds and two baselines."""
    del ray_here
    folder = tmp_path_factory.mktemp("labelled")
    corpus = write_corpus(folder, rows=160)
    held = corpus["evaluation"]["sets"]["held"]["source"]
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    asked = [{"text": row["q"], "label": row["lang"]} for row in lines[:20]]
    corpus["evaluation"]["sets"] |= {
        "bitext": {"source": held, "kind": "bitext"},
        "topics": {"kind": "classification", "train": write(folder / "train.jsonl", asked[10:])}
        | {"test": write(folder / "test.jsonl", asked[:10])},
    }
    beside = tiny_model(folder / "beside", hidden=16)
    engine = Engine(beside)
    with openai_endpoint(lambda texts: engine.embed_counted(texts)[0]) as endpoint:
        corpus["evaluation"]["baselines"] = [str(beside), f"{endpoint.url}#far"]
        pipeline = Pipeline(load_recipe(str(write_recipe(folder, corpus))), str(folder / "root"))
        pipeline.job("prepare")
        pipeline.model("untrained")
        pipeline.evaluate()
    # Nobody answers at the endpoint any more: it was asked once.
    return pipeline, folder


def untrained(pipeline: Pipeline) -> str:
    """The folder of the run's untrained model."""
    return str((pipeline.run.folder(pipeline.graph.model("untrained").stage) / "model").path)


def test_a_run_measures_sets_of_all_kinds_and_trains_on_none(
    evaluated: tuple[Pipeline, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline, folder = evaluated
    graph = pipeline.graph
    folders = {name: pipeline.run.require(graph.evaluations["untrained", name]) for name in graph.sets}
    results = {name: at.read_json("manifest.json")["result"] for name, at in folders.items()}
    assert {name: (found["kind"], found["metric"]) for name, found in results.items()} == {
        "held": ("retrieval", "ndcg@10"),
        "bitext": ("bitext", "f1"),
        "topics": ("classification", "accuracy"),
    }
    for name, found in results.items():
        assert list(found["scores"]) == list(found["languages"]) == ["32", "16", "8", "4"]
        units = folders[name].read_table("units.parquet")
        assert units.column_names == ["id", "language", "target", "32", "16", "8", "4"]
        assert len(units) == found["queries"]
        difference = compare(found["kind"], units, units, (32, 4)).all.difference
        wanted = found["scores"]["32"][found["metric"]] - found["scores"]["4"][found["metric"]]
        assert difference == pytest.approx(wanted, abs=2e-6)
    assert set(results["bitext"]["languages"]["32"]) == {"deu", "fra", "rus", "jpn"}
    asked = [json.loads(line)["text"] for name in ("test", "train") for line in (folder / f"{name}.jsonl").open()]
    prepared = pipeline.run.folder(graph.prepare) / "rows"
    rows = [row for file in prepared.files(".parquet") for row in prepared.read_table(file).to_pylist()]
    dropped = {row["query"] for row in rows if row["drop"] == "decontaminate: topics"}
    assert dropped == set(asked)
    again = pipeline.evaluate_folder(untrained(pipeline))
    assert again == {name: found["scores"] for name, found in results.items()}
    capsys.readouterr()
    pipeline.evaluate()
    assert "evaluate: 10 evaluations finished before, skipped" in capsys.readouterr().out


def test_the_report_holds_the_model_against_bm25_and_a_baseline(evaluated: tuple[Pipeline, Path]) -> None:
    pipeline, folder = evaluated
    report = pipeline.report()
    beside = {entry["name"]: entry for entry in report["baselines"]}
    assert {name: list(entry["scores"]) for name, entry in beside.items()} == {
        "bm25": ["held"],
        "beside": ["held", "bitext", "topics"],
        "far": ["held", "bitext", "topics"],
    }
    assert beside["far"]["model"].endswith("#far")
    assert beside["beside"]["model"] == str(folder / "beside")
    assert pipeline.evaluate_folder(str(folder / "beside")) == beside["beside"]["scores"]
    task = RetrievalSet.read(pipeline.set_folders()["held"])
    measured = task.measure_bm25().scores
    assert beside["bm25"]["scores"]["held"] == measured["scores"]
    assert beside["bm25"]["languages"]["held"] == measured["languages"]
    assert report["chance"] == {"held": task.chance()}
    rows = {(row["set"], row["against"]): row for row in report["standing"]}
    others = {(name, other) for name in pipeline.graph.sets for other in ("beside", "far")}
    assert set(rows) == {("held", "bm25"), *others}
    (compared,) = [row for row in compare_models(pipeline, ["beside", "untrained"]) if row["set"] == "held"]
    assert {key: compared[key] for key in ("difference", "low", "high")} == {
        key: rows["held", "beside"][key] for key in ("difference", "low", "high")
    }
    assert not (Path(pipeline.run.root.path) / "compared").is_dir(), "the run has measured it"
    failed = report["failures"]["held"]
    assert failed, "random weights find nothing"
    for failure in failed:
        query, right = task.query_texts.index(failure["query"]), task.corpus_texts.index(failure["expected"])
        assert (query, right) in set(map(tuple, task.relevant.tolist()))
        assert task.query_languages[query] == failure["language"]
        assert failure["rank"] > 10
    page = (folder / "root" / "report.html").read_text()
    assert "bm25" in page
    assert "Queries that fail: untrained" in page
    assert report["models"][0]["query_ms"] > 0


def test_switching_bm25_off_measures_no_model_again(
    evaluated: tuple[Pipeline, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline, folder = evaluated
    changes = ["evaluation.bm25=false", "evaluation.baselines=[]"]
    without = Pipeline(load_recipe(str(folder / "recipe.yaml"), changes), str(folder / "root"))
    capsys.readouterr()
    without.evaluate()
    said = capsys.readouterr().out
    assert "evaluate: 3 evaluations finished before, skipped" in said
    assert "started" not in said
    report = without.report()
    assert report["baselines"] == report["standing"] == []
    pipeline.report()


def test_a_runs_models_and_others_are_compared(evaluated: tuple[Pipeline, Path]) -> None:
    pipeline, folder = evaluated
    same = untrained(pipeline)
    other = str(tiny_model(folder / "tiny"))
    rows = compare_models(pipeline, ["untrained", same, other])
    assert [(row["set"], row["model"]) for row in rows] == [
        (name, model) for name in ("held", "bitext", "topics") for model in (same, other)
    ]
    for row in rows[::2]:
        assert (row["difference"], row["low"], row["high"], row["wins"], row["losses"]) == (0, 0, 0, [], [])
    scores, others = pipeline.evaluate_folder(same), pipeline.evaluate_folder(other)
    for row in rows[1::2]:
        metric = next(iter(scores[row["set"]]["32"]))
        gap = others[row["set"]]["32"][metric] - scores[row["set"]]["32"][metric]
        assert row["difference"] == pytest.approx(gap, abs=2e-6)
        assert row["low"] <= row["difference"] <= row["high"]
        assert set(row["wins"]).isdisjoint(row["losses"])
    assert len(table(rows).splitlines()) >= len(rows)
    measured = list((Path(pipeline.run.root.path) / "compared").glob("*/results.json"))
    before = {place: place.stat().st_mtime_ns for place in measured}
    assert len(before) == 2 * 3
    assert compare_models(pipeline, ["untrained", same, other]) == rows
    assert {place: place.stat().st_mtime_ns for place in measured} == before
    with pytest.raises(RunError, match=r"neither a model of the run \(.*\) nor a folder with safetensors"):
        compare_models(pipeline, ["untrained", str(folder)])
    with pytest.raises(RunError, match="expected URL#NAME"):
        compare_models(pipeline, ["untrained", "http://127.0.0.1:9/v1"])
    with pytest.raises(RunError, match="two or more different models"):
        compare_models(pipeline, ["untrained", "untrained"])
    with pytest.raises(RunError, match="run `f2llm evaluate` first"):
        compare_models(pipeline, ["untrained", "stage1"])
