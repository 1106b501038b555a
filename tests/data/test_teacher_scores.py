"""A teacher's scores stay with their texts: from the files through every step to the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from f2llm_ray.base.errors import DataError, RecipeError
from f2llm_ray.data.batches.build import BatchPlan, build_batches
from f2llm_ray.data.batches.table import BatchTable
from f2llm_ray.data.reading.columns import Columns
from f2llm_ray.data.reading.files import TableSource
from f2llm_ray.data.schema import KEY, SourceFacts, text_key
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.recipe.files import load_recipe, parse
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.loader import read
from tests.corpus import write_recipe
from tests.tiny import tiny_model

PLAIN = Columns(negatives="neg", scores="scores")


def source(path: Path, *lines: dict[str, Any] | str, columns: Columns = PLAIN) -> TableSource:
    """The rows in the format that the path's ending names."""
    form = path.suffix[1:]
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(list(lines)), path)
    else:
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(f"{line}\n" for line in text))
    return TableSource.model_validate({"format": form, "paths": [str(path)], "columns": columns})


def rows(of: TableSource, bad_row: Any = "error") -> list[dict[str, Any]]:
    return [row for piece in of.pieces("s") for table in of.read("s", piece, bad_row) for row in table.to_pylist()]


def scored(found: list[dict[str, Any]]) -> list[tuple[str, float, dict[str, float]]]:
    return [
        (row["passage"], row["passage_score"], dict(zip(row["negatives"], row["negative_scores"], strict=True)))
        for row in found
    ]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_scores_beside_a_row_are_those_of_its_texts(tmp_path: Path, ending: str) -> None:
    """What is left out, as blank negatives are, goes with its score."""
    found = rows(
        source(
            tmp_path / f"a.{ending}",
            {"query": "q", "passage": "p", "neg": ["a", " ", None, "b"], "scores": [9.0, 1.5, 2.5, 3.5, -4.5]},
            {"query": "r", "passage": "p", "neg": [], "scores": [7.0]},
        )
    )
    assert scored(found) == [("p", 9.0, {"a": 1.5, "b": -4.5}), ("p", 7.0, {})]


def test_scores_in_several_columns(tmp_path: Path) -> None:
    """FlagEmbedding's lists, each positive a row; and tuples in columns with their numbers."""
    columns = Columns(passage="pos", negatives="neg", scores=("pos_scores", "neg_scores"))
    line = {"query": "q", "pos": ["x", "y"], "neg": ["n"], "pos_scores": [3, 2], "neg_scores": [0.5]}
    assert scored(rows(source(tmp_path / "a.jsonl", line, columns=columns))) == [
        ("x", 3.0, {"n": 0.5}),
        ("y", 2.0, {"n": 0.5}),
    ]
    columns = Columns(negatives="negative_*", scores="score_*")
    lines = ["query,passage,negative_1,negative_2,score_1,score_2,score_3", "q,p,a,b,3,2,1.25"]
    assert scored(rows(source(tmp_path / "a.csv", *lines, columns=columns))) == [("p", 3.0, {"a": 2.0, "b": 1.25})]
    lines = ["query,passage,neg,scores", 'q,p,a,"[3, 1]"']
    assert scored(rows(source(tmp_path / "b.csv", *lines))) == [("p", 3.0, {"a": 1.0})]


@pytest.mark.parametrize(
    ("scores", "reason", "message"),
    [
        (
            [1.0],
            "not as many scores as texts",
            "scores: found 1 numbers, expected 3, one for each passage and negative",
        ),
        ([1, 2, 3, 4], "not as many scores as texts", "found 4 numbers, expected 3"),
        (None, "not as many scores as texts", "found 0 numbers, expected 3"),
        ([1, 2, "high"], "scores is not a number or a list of numbers", "scores: found list"),
        ([1, 2, None], "scores is not a number or a list of numbers", "scores: found list"),
        ([1, 2, float("nan")], "scores is not a number or a list of numbers", "scores: found list"),
        ([1, 2, 10**400], "scores is not a number or a list of numbers", "scores: found list"),
    ],
)
def test_scores_that_do_not_fit_their_row(tmp_path: Path, scores: Any, reason: str, message: str) -> None:
    good = {"query": "q", "passage": "p", "neg": ["a", "b"], "scores": [3, 2, 1]}
    of = source(tmp_path / "a.jsonl", good, {**good, "scores": scores}, good)
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*") as error:
        rows(of)
    assert message in str(error.value)
    found = rows(of, "skip")
    assert [row["drop"] for row in found] == [None, f"read: {reason}", None]
    assert scored(found)[::2] == [("p", 3.0, {"a": 2.0, "b": 1.0})] * 2
    assert found[1]["negatives"] == found[1]["negative_scores"] == []


def test_scores_of_another_type_are_refused_before_the_run(tmp_path: Path) -> None:
    of = source(tmp_path / "a.parquet", {"query": "q", "passage": "p", "neg": ["a"], "scores": "high"})
    with pytest.raises(DataError, match="column 'scores': found string, expected a number or a list of numbers"):
        of.pieces("s")


def recipe(**changes: Any) -> dict[str, Any]:
    columns = {"negatives": "neg", "scores": "scores"}
    return {
        "name": "scored",
        "sources": {
            "scored": {"format": "jsonl", "paths": ["scored.jsonl"], "columns": columns, "language": "eng"},
            "plain": {"format": "jsonl", "paths": ["plain.jsonl"], "columns": {"negatives": "neg"}},
        },
        "data": {"near_dedup": {}, "max_tokens": 32, "shards": 2, "validation": 0},
        "tokenizer": {"path": "tiny"},
        "backbone": {"shape": {"hidden": 32, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 64}},
        "stages": {"stage1": {"engine": {"precision": "fp32"}, **changes}},
    }


@pytest.mark.parametrize("term", ["score_margin_weight", "score_kl_weight"])
def test_a_stage_that_learns_from_scores_needs_them(term: str) -> None:
    with pytest.raises(RecipeError, match=rf"stages\.stage1\.{term}: source 'plain' has no scores; name their"):
        parse(Recipe, recipe(**{term: 1.0}), "r")
    with pytest.raises(RecipeError, match=rf"stages\.stage1\.{term}: compares passages with negatives"):
        parse(Recipe, recipe(**{term: 1.0}, sources=["scored"], negatives={}), "r")
    parse(Recipe, recipe(**{term: 1.0}, sources=["scored"]), "r")
    labels = recipe()
    labels["sources"]["scored"]["task"] = "classification"
    with pytest.raises(RecipeError, match="scores rank passages, which is for retrieval; task is classification"):
        parse(Recipe, labels, "r")


def score(query: str, text: str) -> float:
    """A number that tells a pair from all others, and that float32 has."""
    return int.from_bytes(text_key(f"{query}|{text}")[:3], "big") / 2**16


LONG = " ".join(f"word{n}" for n in range(40))


def lines() -> list[dict[str, Any]]:
    """Rows whose negatives are blank, near-equal to the passage, a positive of another row, or none."""
    found = []
    for n in range(24):
        query, passage = f"question {n // 2}", f"answer {n} {LONG} {n}"
        others = [
            f"wrong {n} a",
            "\u00ad",
            f"wrong {n} b",
            passage.upper(),
            f"answer {n ^ 1} {LONG} {n ^ 1}",
            f"c {n}",
        ]
        found.append({"query": query, "passage": passage, "neg": others[: n % 7]})
    return found


@pytest.mark.usefixtures("ray_here")
def test_every_score_of_a_batch_is_that_of_its_pair(tmp_path: Path) -> None:
    """Through cleaning, near-duplicates, dedup and the draw of negatives, beside a source without scores."""
    given = lines()
    for line in given:
        line["scores"] = [score(line["query"], text) for text in (line["passage"], *line["neg"])]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*given, *given[:3]]))
    plain = [{"query": f"plain {n}", "passage": f"said {n}", "neg": [f"not {n}"]} for n in range(8)]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(line) + "\n" for line in plain))
    content = recipe()
    for entry in content["sources"].values():
        entry["paths"] = [str(tmp_path / path) for path in entry["paths"]]
    content["tokenizer"]["path"] = str(tiny_model(tmp_path / "tiny"))
    pipeline = Pipeline(load_recipe(str(write_recipe(tmp_path, content))), str(tmp_path / "root"))
    pipeline.job("prepare")
    prepared = pipeline.run.folder(pipeline.graph.prepare)
    check(given, prepared, tmp_path / "batches", mined=None)
    table = prepared.read_table("table/scored.parquet", ["row_key", "passage_key", "negative_keys"])
    other = table["passage_key"][0].as_py()
    lists = [[*keys[::-1], other] for keys in table["negative_keys"].to_pylist()]
    mined = Folder.at(str(tmp_path / "mined"))
    of_row = {"row_key": table["row_key"], "negative_keys": pa.array(lists, pa.list_(KEY))}
    mined.write_table("scored.parquet", [pa.table(of_row)], pa.table(of_row).schema)
    check(given, prepared, tmp_path / "of_mined", mined=mined, unscored=other)


def check(
    given: list[dict[str, Any]], prepared: Folder, out: Path, *, mined: Folder | None, unscored: bytes = b""
) -> None:
    texts = {text_key(text): text for line in given for text in (line["query"], line["passage"], *line["neg"])}
    texts |= {text_key(text.upper()): text.upper() for text in texts.values()}
    plan = BatchPlan(
        epochs=2,
        max_batches=None,
        held_out_batches=1,
        global_batch=8,
        negatives={"retrieval": 3},
        language_temperature=1.0,
        length_window=1,
        instructions=False,
    )
    facts = {"scored": SourceFacts("retrieval", "", scored=True), "plain": SourceFacts("retrieval", "")}
    build_batches(plan, facts, "seed", prepared=prepared, mined=mined, out=Folder.at(str(out)))
    table = BatchTable(out / "train", tuple(facts))
    pairs = 0
    for entry in table.order():
        batch = table.batch(entry)
        if table.source(entry) == "plain":
            assert batch.schema.names == ["query", "passage", "negatives"]
            continue
        for row in batch.to_pylist():
            keys, scores = [row["passage"], *row["negatives"]], [row["passage_score"], *row["negative_scores"]]
            assert len(keys) == len(scores)
            for key, found in zip(keys, scores, strict=True):
                if found is None:
                    assert key == unscored
                else:
                    assert found == score(texts[row["query"]], texts[key])
                    pairs += 1
    assert pairs > 60
    store = Path(prepared.path) / "tokens"
    whole = list(read(table, store, rank=0, world=1))
    halves = [list(read(table, store, rank=rank, world=2)) for rank in (0, 1)]
    for step, one, two in zip(whole, *halves, strict=True):
        assert (step.scores is None) == (step.source == "plain")
        if step.scores is not None:
            assert step.scores.shape == (8, 1 + step.negative.shape[1])
            assert not np.isnan(step.scores[:, 0]).any()
            if mined is None:
                assert np.array_equal(np.isnan(step.scores[:, 1:]), step.negative < 0)
            split = [half.scores for half in (one, two) if half.scores is not None]
            assert np.array_equal(np.concatenate([part[:, 0] for part in split]), step.scores[:, 0])
