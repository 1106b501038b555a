"""The data steps together, on Ray: planted duplicates, false negatives, contamination; the same bytes always."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from f2llm_ray.base.errors import DataError
from f2llm_ray.data.decontaminate import Screened
from f2llm_ray.data.keys import add_keys
from f2llm_ray.data.near.find import _connect_spread
from f2llm_ray.data.overlap import find_overlap
from f2llm_ray.data.read import read_pairs
from f2llm_ray.data.schema import key_numbers, text_key
from f2llm_ray.data.settings import Decontamination
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.recipe.files import parse
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder

REPO = Path(__file__).parent.parent.parent
OUTPUT = ("rows", "near/groups", "table", "removed", "tokenizer", "tokens")


def words(generator: random.Random, count: int) -> list[str]:
    return [
        generator.choice(("ba", "ko", "mi", "tu", "re")) + str(generator.randrange(10**6)) for _ in range(count)
    ]


def changed(text: str, place: int) -> str:
    """The text with one word replaced: of 60 words, the Jaccard of 5-grams is 0.96 at an end, 0.84 inside."""
    parts = text.split()
    parts[place] = "changed"
    return " ".join(parts)


def planted() -> dict[str, list[dict[str, Any]]]:
    """Rows by source. Names in the queries say what each row is planted for."""
    generator = random.Random(0)
    rows = [{"query": f"plain question {n}", "passage": " ".join(words(generator, 60))} for n in range(200)]
    first = [row["passage"] for row in rows]
    # The same question with a nearly equal answer: a near-duplicate. Another question with it: not one.
    rows += [{"query": f"Plain question {n}?", "passage": changed(first[n], 0)} for n in range(40)]
    rows += [{"query": f"another question {n}", "passage": changed(first[n], 0)} for n in range(20)]
    # A chain: each nearly equals the one before, the ends have little in common.
    link, chain = " ".join(words(generator, 60)), []
    for place in range(0, 60, 4):
        chain.append({"query": "chain question", "passage": link})
        link = changed(link, place)
    # A false negative: the answer to the same question in another row, and one that nearly equals it.
    rows.append(
        {
            "query": "two answers",
            "passage": first[100],
            "negatives": [first[101], "wrong answer", changed(first[101], 59), f"as if {TEST_PASSAGE}"],
        }
    )
    rows.append(
        {"query": "two answers", "passage": first[101], "negatives": [changed(first[101], 0), "another wrong one"]}
    )
    rows.append({"query": "contaminated " + " ".join(words(generator, 5)), "passage": f"so {TEST_PASSAGE} it is"})
    rows.append({"query": "Test  query", "passage": "its answer"})
    scripts = [
        "猫が窓のそばで眠っています" * 4,
        "ภาษาไทยเขียนติดกัน" * 4,
        "הקריאה היא מימין לשמאל " * 4,
        "😀😃" * 20,
        "x",
        "y" * 3 + " z" * 500_000,
    ]
    rows += [{"query": f"script {n}", "passage": text} for n, text in enumerate(scripts)]
    rows += [{"query": f"script {n}", "passage": text + " "} for n, text in enumerate(scripts[:4])]
    giant = " ".join(words(generator, 300))
    labels = [{"query": " ".join(words(generator, 8)), "passage": f"label {n % 3}"} for n in range(90)]
    return {
        "pairs": rows,
        "chain": chain,
        "giant": [{"query": "giant", "passage": changed(giant, n)} for n in range(300)],
        "labels": labels,
        "one": [{"query": "a single row", "passage": "of a source"}],
    }


TEST_PASSAGE = "this passage of the test set must never be seen by any model that is measured on it"


def write_sources(folder: Path, seed: int = 0) -> Recipe:
    """Writes the rows over several files, each in an order that the seed decides, and makes their recipe."""
    sources = {}
    for name, rows in planted().items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        shuffled = random.Random(seed).sample(rows, len(rows)) if seed else rows
        for part in range(3 if len(rows) > 3 else 1):
            text = "".join(json.dumps(row) + "\n" for row in shuffled[part::3])
            (folder / name / f"{part}.jsonl").write_text(text)
        columns = {"negatives": "negatives"} if name == "pairs" else {}
        lines = [json.loads(line) for line in text.splitlines()]
        if columns:
            for file in (folder / name).glob("*.jsonl"):
                lines = [{"negatives": [], **json.loads(line)} for line in file.read_text().splitlines()]
                file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        sources[name] = {
            "format": "jsonl",
            "paths": [f"{name}/*.jsonl"],
            "language": "eng",
            "task": "classification" if name == "labels" else "retrieval",
            "columns": columns,
        }
    held = folder / "held"
    held.mkdir(exist_ok=True)
    pq.write_table(pa.table({"id": ["0"], "text": ["test query"]}), held / "queries.parquet")
    pq.write_table(pa.table({"id": ["0"], "text": [TEST_PASSAGE]}), held / "corpus.parquet")
    pq.write_table(pa.table({"query_id": ["0"], "corpus_id": ["0"]}), held / "qrels.parquet")
    recipe = {
        "name": "planted",
        "sources": sources,
        "data": {
            "max_chars": 2_000_000,
            "max_tokens": 64,
            "near_dedup": {},
            "shards": 4,
            "filters": {"max_repeat": 1},
        },
        "tokenizer": {"train_vocab": 300},
        "backbone": {"shape": {"hidden": 32, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 64}},
        "stages": {"stage1": {"engine": {"precision": "fp32"}}},
        "evaluation": {"sets": {"held": {"folder": "held"}}},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return parse(Recipe, recipe, "planted")


def prepare(recipe: Recipe, folder: Path) -> None:
    """Runs the data steps in the root `folder`/root, and links their folder as `folder`/out."""
    pipeline = Pipeline(recipe, str(folder / "root"))
    pipeline.job("prepare")
    prepared = pipeline.run.folder(pipeline.graph.prepare)
    (folder / "out").symlink_to(prepared.path)


def digest(prepared: Path) -> dict[str, str]:
    files = [path for name in OUTPUT for path in sorted((prepared / name).rglob("*")) if path.is_file()]
    return {str(path.relative_to(prepared)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def prepared(ray_here: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    del ray_here
    folder = tmp_path_factory.mktemp("prepared")
    os.chdir(folder)
    prepare(write_sources(folder), folder)
    return folder


def table_of(prepared: Path, source: str) -> pa.Table:
    return pq.read_table(prepared / "out" / "table" / f"{source}.parquet")


def kept(prepared: Path, source: str) -> list[dict[str, Any]]:
    """The rows that are left, with their texts."""
    texts: dict[bytes, dict[str, Any]] = {}
    for file in sorted((prepared / "out" / "rows").glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            texts.setdefault(row["row_key"], row)
    return [
        {**row, **{side: texts[row["row_key"]][side] for side in ("query", "passage")}}
        for row in table_of(prepared, source).to_pylist()
    ]


def test_passages_of_a_source_are_the_same_ones_however_it_is_cut_into_files(
    prepared: Path, tmp_path: Path
) -> None:
    recipe, whole = write_sources(prepared), tmp_path / "whole.jsonl"
    rows = [json.loads(line) for file in (prepared / "labels").glob("*.jsonl") for line in file.open()]
    rows += [{"query": f"number {n}", "passage": f"the passage of number {n % 40}"} for n in range(80)]
    whole.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = tmp_path / "parts"
    parts.mkdir()
    for part in range(5):
        (parts / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[part::5]))
    found = []
    for paths in ([str(whole)], [str(parts / "*.jsonl")]):
        source = recipe.sources["labels"].model_copy(update={"paths": paths})
        drawn = read_pairs("set", source, recipe.data, 7).to_pylist()
        found.append(sorted((row["query"], row["passage"]) for row in drawn))
        chosen = {row["passage"] for row in drawn}
        assert len(chosen) == 7
        assert {(r["query"], r["passage"]) for r in rows if r["passage"] in chosen} == set(found[-1]), (
            "all queries"
        )
    assert found[0] == found[1]


def test_a_set_that_comes_later_is_looked_for_in_negatives_too(prepared: Path) -> None:
    units = [["wrong answer"], ["asked of nobody"]]
    screened = Screened([text for unit in units for text in unit], [])
    found = find_overlap(Folder.at(str(prepared / "out")), units, screened, Decontamination())
    assert found.units.tolist() == [True, False]
    assert found.rows == 1


def card(prepared: Path) -> dict[str, Any]:
    return dict(json.loads((prepared / "out" / "card.json").read_text()))


def test_near_duplicates_go_only_with_their_question(prepared: Path) -> None:
    rows = kept(prepared, "pairs")
    questions = [row["query"].lower().rstrip("?") for row in rows]
    assert sum(q.startswith("plain question") for q in questions) == 200
    assert sum(q.startswith("another question") for q in questions) == 20, "another question keeps its answer"
    groups = {row["query"]: row["passage_group"] for row in rows}
    by_lower = {query.lower().rstrip("?"): group for query, group in groups.items()}
    assert all(by_lower[f"another question {n}"] == by_lower[f"plain question {n}"] for n in range(20))
    assert sum(q.startswith("script") for q in questions) == 6


def test_a_chain_is_one_group_and_one_row(prepared: Path) -> None:
    assert len(kept(prepared, "chain")) == 1
    assert len(kept(prepared, "giant")) == 1
    found = card(prepared)["near_dedup"]
    assert found["largest_cluster"] == 300
    assert found["clustered_documents"] >= found["clusters"] * 2
    assert found["candidates"] >= found["accepted"] > 0
    assert {sample["source"] for sample in found["samples"]} >= {"pairs", "chain", "giant"}
    assert all(sample["kept"] != sample["dropped"] for sample in found["samples"])


def test_groups_are_the_same_when_no_process_holds_the_edges(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "out" / "near" / "edges", tmp_path / "edges")
    counts = _connect_spread(Folder.at(str(tmp_path)), 4)
    expected = prepared / "out" / "near" / "groups"
    assert {path.name: path.read_bytes() for path in (tmp_path / "groups").iterdir()} == {
        path.name: path.read_bytes() for path in expected.iterdir()
    }
    assert counts.items() <= card(prepared)["near_dedup"].items()


def test_no_false_negative_is_left(prepared: Path) -> None:
    rows = [row for row in kept(prepared, "pairs") if row["query"] == "two answers"]
    negatives = [set(row["negative_keys"]) for row in rows]
    assert sorted(negatives, key=sorted) == sorted(
        [{text_key("wrong answer")}, {text_key("another wrong one")}], key=sorted
    )
    counted = card(prepared)["negatives"]["pairs"]
    assert counted["given"] == 6
    assert sum(counted["dropped"].values()) == 4
    assert counted["dropped"]["a text of held"] == 1


def test_test_texts_are_never_trained_on(prepared: Path) -> None:
    assert not [
        row for row in kept(prepared, "pairs") if "ontaminated" in row["query"] or "est  query" in row["query"]
    ]
    assert card(prepared)["contamination"] == {"held": {"pairs": 2}}


def test_labels_and_single_rows_are_no_duplicates(prepared: Path) -> None:
    labels = table_of(prepared, "labels")
    assert len(labels) == 90
    assert {len(negatives) for negatives in labels["negative_keys"].to_pylist()} == {2}
    assert len(table_of(prepared, "one")) == 1


def test_every_key_of_the_table_leads_to_the_tokens_of_its_text(prepared: Path) -> None:
    from f2llm_ray.data.tokens.store import TokenStore, tokenize
    from f2llm_ray.data.tokens.tokenizer import open_tokenizer

    texts: dict[bytes, str] = {}
    for file in (prepared / "out" / "rows").glob("*.parquet"):
        for row in pq.read_table(file).to_pylist():
            texts |= {row[f"{side}_key"]: row[side] for side in ("query", "passage")}
            texts |= dict(zip(row["negative_keys"], row["negatives"], strict=True))
    tables = [table_of(prepared, source).to_pylist() for source in planted()]
    rows = [row for table in tables for row in table]
    wanted = {key for row in rows for key in (row["query_key"], row["passage_key"], *row["negative_keys"])}
    keys = sorted(wanted)
    found = TokenStore(prepared / "out" / "tokens").lookup(key_numbers(pa.array(keys, pa.binary(16))))
    tokenizer = open_tokenizer(str(prepared / "out" / "tokenizer"))
    for key, tokens in zip(keys, found, strict=True):
        assert tokens.tolist() == tokenize(tokenizer, [texts[key]], 64)[0].tolist()


def test_every_row_is_accounted_for(prepared: Path) -> None:
    total = sum(len(rows) for rows in planted().values())
    found = card(prepared)
    assert sum(row["rows"] for row in found["rows"]) == total == found["steps"][0]["in"]
    left = sum(len(table_of(prepared, source)) for source in planted())
    assert found["steps"][-1]["out"] == left
    removed = {source: pq.read_table(prepared / "out" / "removed" / f"{source}.parquet") for source in planted()}
    reasons = [reason for table in removed.values() for reason in table["drop"].to_pylist()]
    assert len(reasons) == sum(
        row["rows"] for row in found["rows"] if (row["drop"] or "").startswith(("dedup", "near"))
    )


def test_a_clustering_source_without_negatives_is_refused(ray_here: None, tmp_path: Path) -> None:
    del ray_here
    rows = "".join(json.dumps({"query": f"text {n}", "passage": f"its like {n}"}) + "\n" for n in range(5))
    (tmp_path / "rows.jsonl").write_text(rows)
    recipe = write_sources(tmp_path).model_dump(mode="json", exclude={"evaluation"})
    recipe["sources"] = {"c": {"format": "jsonl", "paths": [str(tmp_path / "rows.jsonl")], "task": "clustering"}}
    with pytest.raises(DataError, match="source 'c': none of its 5 rows has a negative, and clustering learns"):
        prepare(parse(Recipe, recipe, "r"), tmp_path)


def test_shuffled_rows_give_the_same_ids(prepared: Path, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    prepare(write_sources(tmp_path, seed=7), tmp_path)
    for source in planted():
        places = ["piece", "position"]
        assert (
            table_of(tmp_path, source).drop_columns(places).equals(table_of(prepared, source).drop_columns(places))
        )


def test_a_killed_prepare_goes_on_with_one_worker_to_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    write_sources(tmp_path)
    script = (
        "import json, sys, ray; from f2llm_ray.pipeline.walk import Pipeline\n"
        "from f2llm_ray.recipe.recipe import Recipe; from f2llm_ray.recipe.files import parse\n"
        "from f2llm_ray.base.session import connect\n"
        "ray.init('local', num_cpus=int(sys.argv[1]), include_dashboard=False); connect()\n"
        "Pipeline(parse(Recipe, json.load(open('recipe.json')), 'r'), 'root').job('prepare')\n"
    )
    run = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    first = subprocess.Popen([*run, "2"], cwd=tmp_path, env=environment, start_new_session=True)
    until = time.monotonic() + 120
    while len(list(tmp_path.glob("root/prepare-*/rows/[0-9]*.parquet"))) < 4:
        assert first.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    time.sleep(1)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("root/prepare-*/rows/[0-9]*.parquet")}
    subprocess.run([*run, "1"], cwd=tmp_path, env=environment, check=True, timeout=200)
    assert digest(next(tmp_path.glob("root/prepare-*"))) == digest(prepared / "out")
    assert {path: path.stat().st_mtime_ns for path in written} == written, "finished parts were read again"


def test_keys_of_a_row_do_not_depend_on_its_neighbours(prepared: Path) -> None:
    file = next((prepared / "out" / "rows").glob("*.parquet"))
    rows = pq.read_table(file)
    again = add_keys(
        rows.select([n for n in rows.column_names if not n.endswith(("_key", "_keys"))]).slice(1, 1), ""
    )
    assert again["row_key"].to_pylist() == rows["row_key"].to_pylist()[1:2]
