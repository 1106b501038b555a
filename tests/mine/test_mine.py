"""Mining against a slow float64 reference over all pairs, whatever the shards; on Ray, resumed, the same bytes."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet as pq
from safetensors.torch import load_file, save_file

from f2llm_ray.base.errors import RecipeError, RunError
from f2llm_ray.data.keys import shard_of
from f2llm_ray.data.schema import KEY, TextPrompts, key_numbers, seeded_key, text_key
from f2llm_ray.data.tokens import store as tokens
from f2llm_ray.data.tokens.build import write_prompts
from f2llm_ray.data.tokens.tokenizer import load_tokenizer
from f2llm_ray.engine.settings import Compute
from f2llm_ray.engine.vector_files import VectorWriter, shard_name
from f2llm_ray.mine.candidates import Candidates, number_texts
from f2llm_ray.mine.join_negatives import join_negatives
from f2llm_ray.mine.mine import _join, _plan, _search, check_tokenizer, mine
from f2llm_ray.mine.search import Layout, search, take_out
from f2llm_ray.mine.settings import Mine
from f2llm_ray.recipe.files import parse
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder
from tests.tiny import tiny_model

Row = dict[str, Any]
Vectors = dict[bytes, np.ndarray[Any, Any]]
EVERYTHING = {"skip": 0, "max_score": 1.0, "relative_margin": None}


def table_of(rows: list[Row]) -> pa.Table:
    """The prepared table of rows query, passage and, where given, near copies' groups and negatives."""
    columns: dict[str, list[Any]] = {
        "row_key": [seeded_key(row["query"], row["passage"]) for row in rows],
        "query_key": [text_key(row["query"]) for row in rows],
        "instructed_key": [text_key("Find: " + row["query"]) for row in rows],
        "passage_key": [text_key(row["passage"]) for row in rows],
        "query_group": [text_key(row.get("query_group", row["query"])) for row in rows],
        "passage_group": [text_key(row.get("passage_group", row["passage"])) for row in rows],
    }
    table = pa.table({name: pa.array(values, KEY) for name, values in columns.items()})
    negatives = [[text_key(text) for text in row.get("negatives", [])] for row in rows]
    table = table.append_column("negative_keys", pa.array(negatives, pa.list_(KEY)))
    return table.append_column("validation", pa.array([n % 5 == 0 for n in range(len(rows))])).sort_by("row_key")


def reference(table: pa.Table, vectors: Vectors, settings: Mine, query: str = "query_key") -> list[list[bytes]]:
    """Negatives of each row, by a loop over all pairs in float64."""
    rows = table.to_pylist()
    group_of = {row["passage_key"]: row["passage_group"] for row in rows}
    candidates = sorted(
        {group: min(k for k, g in group_of.items() if g == group) for group in group_of.values()}.values()
    )
    found = []
    for row in rows:
        positives = {r["passage_group"] for r in rows if r["query_group"] == row["query_group"]}
        mine = vectors[row[query]].astype(np.float64)
        own = float(mine @ vectors[row["passage_key"]].astype(np.float64))
        scored = [(-float(mine @ vectors[key].astype(np.float64)), key) for key in candidates]
        nearest = sorted(pair for pair in scored if group_of[pair[1]] not in positives)[: settings.top_k]
        limit = math.inf if settings.relative_margin is None else own - abs(own) * settings.relative_margin
        limit = min(limit, settings.max_score)
        if settings.absolute_margin is not None:
            limit = min(limit, own - settings.absolute_margin)
        mined = [key for score, key in nearest[settings.skip :] if -score <= limit]
        given = list(dict.fromkeys(row["negative_keys"]))
        taken = {group_of[key] for key in given if key in group_of}
        found.append([*given, *(key for key in mined if group_of[key] not in taken)][: settings.count])
    return found


def mined_here(
    table: pa.Table, vectors: Vectors, settings: Mine, layout: Layout, folder: Path, query: str = "query_key"
) -> tuple[list[list[bytes]], dict[str, int]]:
    """What the stage's parts make of vectors that were written for them, shards in falling order."""
    number_texts(table, query).save(Folder.at(str(folder / "plan")))
    found = Candidates.load(Folder.at(str(folder / "plan")))
    at = Folder.at(str(folder / "vectors"))
    keys = [high.to_bytes(8, "big") + low.to_bytes(8, "big") for high, low in found.texts.T.tolist()]
    for first in range(0, len(keys), layout.texts):
        part = np.stack([vectors[key] for key in keys[first : first + layout.texts]]).astype(np.float16)
        at.write_array(shard_name(first // layout.texts), part)
    parts, dropped = [], {}
    for shard in reversed(range(-(-len(found.queries) // layout.queries))):
        part, counts = search(found, at, shard, settings, layout=layout)
        parts.append(part)
        dropped = {reason: dropped.get(reason, 0) + count for reason, count in counts.items()}
    mined = pa.concat_tables(parts).combine_chunks().sort_by("row")["candidates"].combine_chunks()
    lists = join_negatives(table["negative_keys"].combine_chunks(), mined, found, settings.count)
    return lists.to_pylist(), dropped


def random_rows(generator: np.random.Generator, rows: int) -> list[Row]:
    """Rows whose queries and passages come again, some as near copies, some with negatives of their own."""
    pairs = {(int(q), int(p)) for q, p in generator.integers(0, [rows // 2, rows], (rows, 2))}
    return [
        {
            "query": f"query {q}",
            "query_group": f"query {q - q % 3}" if q % 4 == 0 else f"query {q}",
            "passage": f"passage {p}",
            "passage_group": f"passage {p - p % 4}" if p % 3 == 0 else f"passage {p}",
            "negatives": [f"given {n % 7}" for n in range(p % 4)] + [f"passage {p + 1}"] * (q % 3),
        }
        for q, p in sorted(pairs)
    ]


def coarse_vectors(generator: np.random.Generator, table: pa.Table) -> Vectors:
    """Vectors of few values, so that scores tie often and are the same in any order of adding up."""
    names = ("query_key", "instructed_key", "passage_key")
    keys = {key for name in names for key in table[name].to_pylist()}
    return {key: generator.integers(-2, 3, 16).astype(np.float32) / 8 for key in sorted(keys)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "limits",
    [
        {"top_k": 12, "count": 5, "skip": 2, "max_score": 0.25, "relative_margin": 0.25},
        {"top_k": 7, "count": 24, **EVERYTHING, "absolute_margin": 0.125},
        {"top_k": 100, "count": 300, **EVERYTHING},
    ],
)
def test_negatives_are_those_of_a_loop_over_all_pairs_in_any_shards(
    seed: int, limits: dict[str, Any], tmp_path: Path
) -> None:
    generator = np.random.default_rng(seed)
    table = table_of(random_rows(generator, 90))
    vectors = coarse_vectors(generator, table)
    settings = Mine(model="m", **limits)
    query = ("query_key", "instructed_key")[seed % 2]
    expected = reference(table, vectors, settings, query)
    layouts = (Layout(4096, 4096), Layout(37, 11), Layout(5, 100), Layout(100, 1))
    found = [mined_here(table, vectors, settings, cut, tmp_path / f"{cut}", query) for cut in layouts]
    assert [lists for lists, _ in found] == [expected] * len(layouts)
    assert [dropped for _, dropped in found] == [found[0][1]] * len(layouts)
    assert sum(map(len, expected)) > len(table)


def test_planted_positives_and_near_copies_are_never_chosen(tmp_path: Path) -> None:
    """All are the query's very vector; only the plain neighbour may be mined, and it once of its two copies."""
    rows: list[Row] = [
        {"query": "q", "passage": "own"},
        {"query": "q", "passage": "other answer"},
        {"query": "q, reworded", "query_group": "q", "passage": "answer to the reworded"},
        {"query": "elsewhere", "passage": "own, copied", "passage_group": "own"},
        {"query": "third", "passage": "neighbour"},
        {"query": "fourth", "passage": "neighbour, copied", "passage_group": "neighbour"},
    ]
    table = table_of(rows)
    same = np.full(16, 0.25, np.float32)
    texts = {key for name in ("query_key", "passage_key") for key in table[name].to_pylist()}
    lists, dropped = mined_here(
        table, dict.fromkeys(texts, same), Mine(model="m", **EVERYTHING), Layout(), tmp_path
    )
    neighbour = min(text_key("neighbour"), text_key("neighbour, copied"))
    of_query = dict(zip(table["row_key"].to_pylist(), lists, strict=True))
    for passage in ("own", "other answer"):
        assert of_query[seeded_key("q", passage)] == [neighbour]
    assert of_query[seeded_key("q, reworded", "answer to the reworded")] == [neighbour]
    # 3 for each of the group's 3 rows, and 1 for each of the other 3.
    assert dropped == {"positive": 12, "skip": 0, "max_score": 0, "margin": 0}


def test_given_negatives_stay_first_and_mined_ones_fill_up_to_the_count(tmp_path: Path) -> None:
    rows: list[Row] = [{"query": f"q{n}", "passage": f"p{n}"} for n in range(8)]
    rows[0]["negatives"] = ["brought a", "p3", "brought a", "brought b"]
    rows[1]["negatives"] = [f"brought {n}" for n in range(9)]
    table = table_of(rows)
    vectors = coarse_vectors(np.random.default_rng(0), table)
    settings = Mine(model="m", count=6, **EVERYTHING)
    lists = dict(
        zip(table["row_key"].to_pylist(), mined_here(table, vectors, settings, Layout(), tmp_path)[0], strict=True)
    )
    first = lists[seeded_key("q0", "p0")]
    assert first[:3] == [text_key(text) for text in ("brought a", "p3", "brought b")]
    assert len(first) == len(set(first)) == 6
    assert set(first[3:]) < {text_key(f"p{n}") for n in (1, 2, 4, 5, 6, 7)}
    assert lists[seeded_key("q1", "p1")] == [text_key(f"brought {n}") for n in range(6)]


def test_a_source_of_one_row_has_nothing_to_mine(tmp_path: Path) -> None:
    table = table_of([{"query": "q", "passage": "p", "negatives": ["brought"]}])
    vectors = coarse_vectors(np.random.default_rng(0), table)
    lists, dropped = mined_here(table, vectors, Mine(model="m", **EVERYTHING), Layout(), tmp_path)
    assert lists == [[text_key("brought")]]
    assert dropped == {"positive": 1, "skip": 0, "max_score": 0, "margin": 0}


def test_what_is_taken_out_leaves_the_score_of_no_result() -> None:
    scores = torch.arange(12.0).reshape(3, 4)
    rows, columns = torch.tensor([0, 0, 2]), torch.tensor([1, 3, 0])
    assert take_out(scores, rows, columns).tolist() == [1, 3, 8]
    assert scores[rows, columns].tolist() == [-math.inf] * 3
    assert scores.isinf().sum() == 3


# On Ray, with a model.

LAYOUT = Layout(texts=24, queries=9)


def write_prepared(folder: Path, model: Path, sources: dict[str, pa.Table], texts: dict[bytes, str]) -> Folder:
    """What the prepare stage leaves, as far as mining reads it."""
    (folder / "table").mkdir(parents=True)
    for name, table in sources.items():
        pq.write_table(table, folder / "table" / f"{name}.parquet")
    write_prompts(Folder.at(str(folder)), TextPrompts())
    (folder / "tokenizer").mkdir()
    shutil.copy(model / "tokenizer.json", folder / "tokenizer")
    store = folder / "tokens"
    store.mkdir()
    lengths = tokens.write_piece(
        store / "000000.bin", [tokens.tokenize(load_tokenizer(model), list(texts.values()))]
    )
    entries = lengths.append_column("key", pa.array(list(texts), KEY))
    entries = entries.append_column("piece", pa.array([0] * len(texts), pa.int64()))
    shards = shard_of(key_numbers(entries["key"]), 2)
    for shard in range(2):
        tokens.write_index(store, shard, entries.filter(pa.array(shards == shard)))
    tokens.write_meta(store, shards=2, texts=len(texts), tokens=sum(lengths["length"].to_pylist()))
    return Folder.at(str(folder))


def small_recipe() -> Recipe:
    place = {"format": "jsonl", "paths": ["nowhere.jsonl"]}
    engine = {"precision": "fp32"}
    shape = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 64}
    return Recipe.model_validate(
        {
            "name": "small",
            "sources": {"ui": place, "docs": place, "labels": {**place, "task": "classification"}},
            "tokenizer": {"train_vocab": 400},
            "backbone": {"shape": shape},
            "stages": {"stage1": {"engine": engine}},
        }
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tables() -> dict[str, pa.Table]:
    generator = np.random.default_rng(5)
    return {"ui": table_of(random_rows(generator, 70)), "docs": table_of(random_rows(generator, 8))}


@pytest.fixture(scope="module")
def texts() -> dict[bytes, str]:
    names = [f"{kind} {n}" for kind in ("query", "passage") for n in range(75)]
    return {
        text_key(text): f"{text} " + "猫 and dog " * (n % 9)
        for n, text in enumerate([*names, *(f"Find: {n}" for n in names)])
    }


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mined_in_order(prepared: Folder, model: Path, out: Folder, settings: Mine, sources: list[str]) -> None:
    """The stage in this process, one piece of work after the other, the last shard first."""
    encoder = VectorWriter(Folder.at(str(model)), prepared / "tokens", 1)
    cut = {"settings": settings, "layout": LAYOUT, "threads": 1, "device": "cpu"}
    for name in sources:
        _plan({"source": name}, prepared=prepared, out=out, query="instructed_key")
        found = Candidates.load(out / "plan" / name)
        for shard in reversed(range(-(-len(found.number) // LAYOUT.texts))):
            keys = found.texts[:, shard * LAYOUT.texts : (shard + 1) * LAYOUT.texts].T
            encoder.write(np.ascontiguousarray(keys), out / "vectors" / name, shard_name(shard))
        for shard in reversed(range(-(-len(found.queries) // LAYOUT.queries))):
            _search({"source": name, "shard": shard}, out=out, **cut)
        _join({"source": name}, prepared=prepared, out=out, count=settings.count)


@pytest.mark.usefixtures("ray_here")
def test_a_run_that_broke_off_goes_on_to_the_bytes_of_one_process_in_another_order(
    tmp_path: Path, model: Path, tables: dict[str, pa.Table], texts: dict[bytes, str]
) -> None:
    prepared = write_prepared(tmp_path / "prepared", model, tables, texts)
    lost = min(tables["ui"]["passage_key"].to_pylist())
    lacking = write_prepared(
        tmp_path / "lacking", model, tables, {key: text for key, text in texts.items() if key != lost}
    )
    settings = Mine(model="m", top_k=20, count=6, skip=2, max_score=1.0, relative_margin=0.001)
    places: Any = {"model": Folder.at(str(model)), "out": Folder.at(str(tmp_path / "out")), "layout": LAYOUT}
    with pytest.raises(RunError, match=f"no text with key {lost.hex()}"):
        mine(list(tables), settings, Compute(workers=2), prepared=lacking, **places)
    vectors = tmp_path / "out" / "vectors"
    shards = {path: path.stat().st_ino for path in vectors.rglob("*.npy")}
    written = sum(len(np.load(path)) for path in shards)
    half = vectors / "ui" / ".000000.npy.cut-off"
    half.write_bytes(b"half of a shard")
    facts = mine(list(tables), settings, Compute(), prepared=prepared, **places)
    half.unlink()
    assert {path: path.stat().st_ino for path in shards} == shards
    assert 0 < facts["texts"] == sum(source["texts"] for source in facts["sources"].values()) - written
    assert written > 0

    mined_in_order(prepared, model, Folder.at(str(tmp_path / "here")), settings, ["docs", "ui"])
    assert files_of(tmp_path / "out") == files_of(tmp_path / "here")
    for name, table in tables.items():
        _check_against_reference(tmp_path / "out", name, table, settings, facts["sources"][name])


def _check_against_reference(out: Path, name: str, table: pa.Table, settings: Mine, facts: dict[str, Any]) -> None:
    """The mined file has the scores of the reference; near-equal ones may change places."""
    found = Candidates.load(Folder.at(str(out / "plan" / name)))
    keys = [high.to_bytes(8, "big") + low.to_bytes(8, "big") for high, low in found.texts.T.tolist()]
    shards = sorted((out / "vectors" / name).glob("*.npy"))
    vectors = dict(zip(keys, np.concatenate([np.load(shard) for shard in shards]), strict=True))
    mined = pq.read_table(out / f"{name}.parquet")
    assert mined.schema.field("negative_keys").type == pa.list_(KEY)
    assert mined["row_key"].to_pylist() == table["row_key"].to_pylist()
    lists, expected = mined["negative_keys"].to_pylist(), reference(table, vectors, settings, "instructed_key")
    for row, ours, slow in zip(table.to_pylist(), lists, expected, strict=True):
        mine = vectors[row["instructed_key"]].astype(np.float64)
        given = len(set(row["negative_keys"]))
        assert ours[:given] == slow[:given]
        scores = [[float(mine @ vectors[key]) for key in keys[given:]] for keys in (ours, slow)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-6)
        assert len(set(ours)) == len(ours)
    assert facts["short_rows"] == sum(len(keys) < settings.count for keys in lists)
    assert facts["mean_negatives"] == pytest.approx(sum(map(len, lists)) / len(lists), abs=1e-3)
    assert facts["rows"] == len(table)
    assert facts["texts"] == len(keys)


def test_vectors_are_the_engines_and_broken_ones_are_refused(
    tmp_path: Path, model: Path, tables: dict[str, pa.Table], texts: dict[bytes, str]
) -> None:
    prepared = write_prepared(tmp_path / "prepared", model, tables, texts)
    keys = key_numbers(pa.array(list(texts), KEY))
    encoder = VectorWriter(Folder.at(str(model)), prepared / "tokens", 1)
    outcome = encoder.write(keys, Folder.at(str(tmp_path / "out")), shard_name(0))
    vectors = np.load(tmp_path / "out" / shard_name(0))
    assert vectors.dtype == np.float16
    assert outcome["texts"] == len(texts)
    np.testing.assert_allclose(vectors, encoder.engine.embed(list(texts.values())), atol=2e-3)

    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        RunError, match=rf"not finite for {len(texts)} of {len(texts)} texts.*{next(iter(texts)).hex()}"
    ):
        VectorWriter(Folder.at(str(broken)), prepared / "tokens", 1).write(
            keys, Folder.at(str(tmp_path / "none")), shard_name(0)
        )
    assert not (tmp_path / "none").exists()


def test_sources_that_cannot_be_mined_are_refused() -> None:
    recipe = small_recipe()
    for wanted, found in ((None, ["ui", "docs"]), (("docs",), ["docs"])):
        assert recipe.model_copy(update={"mine": Mine(model="m", sources=wanted)}).mined_sources() == found
    settings = {**recipe.model_dump(mode="json"), "mine": {"model": "m", "sources": ["docs", "labels", "nothing"]}}
    with pytest.raises(
        RecipeError, match=r"\['labels', 'nothing'\] not among the retrieval sources \['ui', 'docs'\]"
    ):
        parse(Recipe, settings, "r")


def test_a_model_with_another_tokenizer_is_refused(tmp_path: Path, model: Path) -> None:
    prepared = tmp_path / "tokenizer"
    prepared.mkdir()
    text = (model / "tokenizer.json").read_text(encoding="utf-8")
    (prepared / "tokenizer.json").write_text(text, encoding="utf-8")
    check_tokenizer(Folder.at(str(prepared)), Folder.at(str(model)))
    (prepared / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|end|>"), encoding="utf-8")
    with pytest.raises(RunError, match="differ in added_tokens, model, post_processor"):
        check_tokenizer(Folder.at(str(prepared)), Folder.at(str(model)))
