"""Mining with another model's scores: against a slow loop over pairs, whatever the shards and workers."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from f2llm_ray.base.errors import DataError, RecipeError, RunError
from f2llm_ray.data.keys import shard_of
from f2llm_ray.data.ragged import Ints
from f2llm_ray.data.schema import KEY, TextPrompts, key_numbers, query_text
from f2llm_ray.data.tokens import store as tokens
from f2llm_ray.data.tokens.build import write_prompts
from f2llm_ray.data.tokens.tokenizer import load_tokenizer
from f2llm_ray.engine.cross_encoder import CrossEncoder
from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.settings import Compute
from f2llm_ray.engine.vector_files import shard_name
from f2llm_ray.mine.candidates import Candidates, number_texts
from f2llm_ray.mine.join_negatives import join_negatives
from f2llm_ray.mine.mine import mine
from f2llm_ray.mine.rescore import near_table, rescore
from f2llm_ray.mine.scorers import VectorScorer, look_at
from f2llm_ray.mine.search import Layout, find_near
from f2llm_ray.mine.settings import Mine
from f2llm_ray.pipeline.declare import declare
from f2llm_ray.pipeline.model_stages import _rescorer_files
from f2llm_ray.recipe.files import parse
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.root import Run
from tests.corpus import write_corpus
from tests.encoders import tokenizer_of
from tests.mine.test_mine import (
    Row,
    Vectors,
    coarse_vectors,
    files_of,
    random_rows,
    small_recipe,
    table_of,
)
from tests.tiny import LINES, tiny_model

WORDS = sorted({word for line in LINES for word in line.split()})
LAYOUT = Layout(texts=24, queries=9, rescored=3)
LIMITS = {"top_k": 9, "count": 4, "skip": 1, "max_score": 0.9, "relative_margin": 0.05}


def reference(
    table: pa.Table,
    near: dict[tuple[bytes, bytes], float],
    again: dict[tuple[bytes, bytes], float],
    settings: Mine,
) -> list[list[bytes]]:
    """The mined negatives of each row by a loop over pairs: nearest by one table of scores, chosen by another."""
    rows = table.to_pylist()
    group_of = {row["passage_key"]: row["passage_group"] for row in rows}
    candidates = {group: min(k for k, g in group_of.items() if g == group) for group in group_of.values()}.values()
    found = []
    for row in rows:
        positives = {r["passage_group"] for r in rows if r["query_group"] == row["query_group"]}
        query, own = row["query_key"], again[row["query_key"], row["passage_key"]]
        others = [key for key in candidates if group_of[key] not in positives]  # positives go before the nearest
        nearest = sorted(others, key=lambda key: (-near[query, key], key))[: settings.top_k]
        rescored = sorted(nearest, key=lambda key: (-again[query, key], key))
        limit = min(settings.max_score, *(
            [] if settings.relative_margin is None else [own - abs(own) * settings.relative_margin]
        ), math.inf if settings.absolute_margin is None else own - settings.absolute_margin)  # fmt: skip
        found.append([key for key in rescored[settings.skip :] if again[query, key] <= limit][: settings.count])
    return found


def cosines(table: pa.Table, vectors: Vectors) -> dict[tuple[bytes, bytes], float]:
    queries, passages = (set(table[name].to_pylist()) for name in ("query_key", "passage_key"))
    wide = {key: vector.astype(np.float64) for key, vector in vectors.items()}
    return {(q, p): float(wide[q] @ wide[p]) for q in queries for p in passages}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "limits",
    [
        {"top_k": 7, "count": 5, "skip": 2, "max_score": 0.75, "relative_margin": 0.25},
        {"top_k": 12, "count": 3, "skip": 0, "max_score": 1.0, "relative_margin": None, "absolute_margin": 0.25},
        {"top_k": 200, "count": 200, "skip": 0, "max_score": 1.0, "relative_margin": None},
    ],
)
def test_the_nearest_are_chosen_by_the_other_scores_in_any_shards(
    seed: int, limits: dict[str, Any], tmp_path: Path
) -> None:
    """Few values, so that both kinds of scores tie; several positives of a query, all of which are out."""
    generator = np.random.default_rng(seed)
    table = table_of([{**row, "negatives": []} for row in random_rows(generator, 90)])
    vectors, settings = coarse_vectors(generator, table), Mine(model="m", rescore="r", **limits)
    near = cosines(table, vectors)
    again = {pair: float(generator.integers(0, 9)) / 8 for pair in sorted(near)}
    expected = reference(table, near, again, settings)
    found = number_texts(table, "query_key")
    keys = [high.to_bytes(8, "big") + low.to_bytes(8, "big") for high, low in found.texts.T.tolist()]

    def score(source: str, found: Candidates, query_m: Ints, text_m: Ints) -> np.ndarray[Any, Any]:
        assert source == "s"
        pairs = zip(found.queries[query_m].tolist(), text_m.tolist(), strict=True)
        return np.array([again[keys[query], keys[text]] for query, text in pairs], np.float32)

    for layout in (Layout(4096, 4096), Layout(37, 12, 4), Layout(100, 1, 1)):
        at = Folder.at(str(tmp_path / f"{layout}"))
        for first in range(0, len(keys), layout.texts):
            part = np.stack([vectors[key] for key in keys[first : first + layout.texts]]).astype(np.float16)
            at.write_array(shard_name(first // layout.texts), part)
        parts = []
        for shard in range(-(-len(found.queries) // layout.queries)):
            shown = near_table(find_near(found, at, shard, settings.top_k, layout=layout))
            for first in range(0, len(shown), layout.rescored):
                some = shown.slice(first, layout.rescored)
                parts.append(rescore("s", found, some, shard * layout.queries + first, score, settings)[0])
        mined = pa.concat_tables(parts).combine_chunks().sort_by("row")["candidates"].combine_chunks()
        lists = join_negatives(table["negative_keys"].combine_chunks(), mined, found, settings.count)
        assert lists.to_pylist() == expected
    assert sum(map(len, expected)) > len(table) / 2


# With models.


def sentence(name: str) -> str:
    """Words that the tiny tokenizers know, always the same for a name."""
    return " ".join(np.random.default_rng(zlib.crc32(name.encode())).choice(WORDS, 3 + len(name) % 9))


def sentences(row: Row) -> Row:
    said = {key: sentence(value) for key, value in row.items() if isinstance(value, str)}
    return {**said, "negatives": [sentence(text) for text in row["negatives"]]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder with random weights that says something else of every pair."""
    return cross_encoder(tmp_path_factory.mktemp("judge"))


def cross_encoder(folder: Path, *, labels: int = 1, vocabulary: int | None = None) -> Path:
    import torch
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    tokenizer = tokenizer_of("bert")
    config = BertConfig(
        vocab_size=vocabulary or tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=48, max_position_embeddings=64, initializer_range=0.3,
        num_labels=labels, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        BertForSequenceClassification(config).save_pretrained(folder)
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=24, **special)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [sentences(row) for row in random_rows(np.random.default_rng(5), 40)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, model: Path, rows: list[Row]) -> Folder:
    """What the prepare stage leaves, as far as mining and a store of the texts read it."""
    folder = tmp_path_factory.mktemp("prepared")
    table = table_of(rows)
    place = {key: at for at, key in enumerate(table["row_key"].to_pylist())}
    ordered = sorted(rows, key=lambda row: place[table_of([row])["row_key"][0].as_py()])
    table = table.append_column("piece", pa.array([0] * len(rows), pa.int64()))
    table = table.append_column("position", pa.array(range(len(rows)), pa.int64()))
    for name in ("table", "rows", "tokenizer", "tokens"):
        (folder / name).mkdir()
    pq.write_table(table, folder / "table" / "ui.parquet")
    written = pa.Table.from_pylist(
        [{"source": "ui", **{name: row[name] for name in ("query", "passage", "negatives")}} for row in ordered]
    )
    written = written.append_column("negative_keys", table["negative_keys"])
    pq.write_table(written, folder / "rows" / "000000.parquet")
    write_prompts(Folder.at(str(folder)), TextPrompts())
    shutil.copy(model / "tokenizer.json", folder / "tokenizer")
    texts = texts_of(rows)
    store = folder / "tokens"
    lengths = tokens.write_piece(
        store / "000000.bin", [tokens.tokenize(load_tokenizer(model), list(texts.values()))]
    )
    entries = lengths.append_column("key", pa.array(list(texts), KEY))
    entries = entries.append_column("piece", pa.array([0] * len(texts), pa.int64()))
    assert not shard_of(key_numbers(entries["key"]), 1).any()
    tokens.write_index(store, 0, entries)
    tokens.write_meta(store, shards=1, texts=len(texts), tokens=sum(lengths["length"].to_pylist()))
    return Folder.at(str(folder))


def texts_of(rows: list[Row]) -> dict[bytes, str]:
    """All texts by their keys; the tiny model reads queries with an instruction."""
    found: dict[bytes, str] = {}
    for row in rows:
        table = table_of([row])
        query, passage = row["query"], row["passage"]
        for name, text in {"query_key": query, "instructed_key": f"Find: {query}", "passage_key": passage}.items():
            found[table[name][0].as_py()] = text
    return found


def logits_slowly(folder: Path, pairs: list[tuple[str, str]]) -> list[float]:
    """One pair at a time, without padding, in float64."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return [
            float(
                model(**tokenizer(*pair, truncation=True, max_length=24, return_tensors="pt")).logits[0, 0]
            )
            for pair in pairs
        ]  # fmt: skip


def test_a_cross_encoder_scores_pairs_as_one_at_a_time(judge: Path) -> None:
    pairs = [(sentence(f"q{n % 7}"), sentence("p" * (n % 11) + str(n))) for n in range(60)]
    slow = [1 / (1 + math.exp(-logit)) for logit in logits_slowly(judge, pairs)]
    scores = CrossEncoder(judge).score(*map(list, zip(*pairs, strict=True)))
    assert scores == pytest.approx(slow, abs=1e-5)
    assert np.ptp(scores) > 0.5
    assert len(CrossEncoder(judge).score([], [])) == 0


@pytest.mark.usefixtures("ray_here")
def test_a_cross_encoder_chooses_among_the_nearest_with_one_worker_and_with_two(
    tmp_path: Path, model: Path, judge: Path, prepared: Folder, rows: list[Row]
) -> None:
    settings = Mine(model="m", rescore="r", **LIMITS)
    facts = {}
    for workers in (1, 2):
        places: Any = {"prepared": prepared, "model": Folder.at(str(model)), "layout": LAYOUT}
        out = Folder.at(str(tmp_path / str(workers)))
        rescorer = Folder.at(str(judge))
        facts[workers] = mine(["ui"], settings, Compute(workers=workers), rescorer=rescorer, out=out, **places)
    assert facts[1]["rescored_by"] == facts[2]["rescored_by"] == "cross_encoder"
    assert facts[1]["sources"]["ui"]["dropped"] == facts[2]["sources"]["ui"]["dropped"]
    both = [
        {name: data for name, data in files_of(tmp_path / str(workers)).items() if not name.startswith("texts")}
        for workers in (1, 2)
    ]
    assert both[0] == both[1]

    table, texts = pq.read_table(Path(prepared.path) / "table" / "ui.parquet"), texts_of(rows)
    engine = Engine(model)
    vectors = dict(zip(texts, engine.embed(list(texts.values())).astype(np.float16), strict=True))
    instructed = dict(zip(table["query_key"].to_pylist(), table["instructed_key"].to_pylist(), strict=True))
    pairs = [(q, p) for q in instructed for p in sorted(set(table["passage_key"].to_pylist()))]
    near = {(q, p): float(vectors[instructed[q]].astype(float) @ vectors[p].astype(float)) for q, p in pairs}
    logits = logits_slowly(judge, [(texts[q], texts[p]) for q, p in pairs])
    again = {pair: 1 / (1 + math.exp(-logit)) for pair, logit in zip(pairs, logits, strict=True)}
    expected = reference(table, near, again, settings.model_copy(update={"count": 10**6}))
    mined = pq.read_table(tmp_path / "1" / "ui.parquet")
    some = 0
    for row, ours, slow in zip(table.to_pylist(), mined["negative_keys"].to_pylist(), expected, strict=True):
        given = list(dict.fromkeys(row["negative_keys"]))
        own = {p["passage_group"] for p in table.to_pylist() if p["query_group"] == row["query_group"]}
        group_of = dict(zip(table["passage_key"].to_pylist(), table["passage_group"].to_pylist(), strict=True))
        taken = {group_of[key] for key in given if key in group_of}
        want = [*given, *(key for key in slow if group_of[key] not in taken)][: settings.count]
        assert ours == want
        assert not {group_of.get(key) for key in ours[len(given) :]} & own
        some += len(ours) - len(given[: settings.count])
    assert some > len(rows) / 2


@pytest.mark.usefixtures("ray_here")
def test_an_embedding_model_scores_by_the_cosines_of_what_it_reads(
    tmp_path: Path, model: Path, prepared: Folder, rows: list[Row]
) -> None:
    other = tiny_model(tmp_path / "other", hidden=16, name="other")
    out, settings = Folder.at(str(tmp_path / "out")), Mine(model="m", rescore="r", **LIMITS)
    facts = mine(
        ["ui"], settings, Compute(workers=2), prepared=prepared, model=Folder.at(str(model)),
        rescorer=Folder.at(str(other)), instructions={"ui": "Find it."}, out=out, layout=LAYOUT,
    )  # fmt: skip
    assert facts["rescored_by"] == "embedding"
    found, texts = Candidates.load(out / "plan" / "ui"), texts_of(rows)
    keys = [high.to_bytes(8, "big") + low.to_bytes(8, "big") for high, low in np.asarray(found.texts).T.tolist()]
    query_m, text_m = (part.ravel() for part in np.indices((len(found.queries), len(found.candidates))))
    text_m = np.asarray(found.candidates)[text_m]
    scores = VectorScorer(out, LAYOUT)("ui", found, query_m, text_m)
    engine = Engine(other)
    bare = {key: text.removeprefix("Find: ") for key, text in texts.items()}
    queries = engine.embed([query_text(bare[keys[at]], "Find it.") for at in found.queries])
    passages = engine.embed([bare[keys[at]] for at in found.candidates])
    assert scores == pytest.approx((queries @ passages.T).ravel(), abs=2e-3)


def test_what_cannot_rescore_is_refused_in_one_line(tmp_path: Path, judge: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(RunError) as caught:
            look_at(Folder.at(str(folder)))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "config.json: found 3 labels, expected 1" in refused(cross_encoder(tmp_path / "three", labels=3))
    small = cross_encoder(tmp_path / "small", vocabulary=40)
    assert "entries, the model beside it 40; expected that model's tokenizer" in refused(small)
    bare = shutil.copytree(judge, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    assert "tokenizer.json: no such file" in refused(bare)
    headless = shutil.copytree(judge, tmp_path / "headless")
    config = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    assert "found architecture BertModel, expected a cross-encoder" in refused(headless)
    with pytest.raises(DataError, match=r"mine.rescore: /nowhere/judge: found no model there"):
        _rescorer_files("mine.rescore", "/nowhere/judge")
    with pytest.raises(RunError, match="found 3 labels"):  # before any work
        _rescorer_files("mine.rescore", str(tmp_path / "three"))


def test_weights_without_the_head_are_refused(tmp_path: Path, judge: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(judge, tmp_path / "judge")
    weights = {name: t for name, t in load_file(folder / "model.safetensors").items() if "classifier" not in name}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"2 weights are not there, such as classifier.bias"):
        CrossEncoder(folder)


def test_a_recipe_names_a_rescorer_that_can_be() -> None:
    settings = small_recipe().model_dump(mode="json")

    def refused(rescore: str, model: str = "untrained") -> str:
        with pytest.raises(RecipeError) as caught:
            parse(Recipe, {**settings, "mine": {"model": model, "rescore": rescore}}, "r")
        return str(caught.value)

    assert "mine.rescore: 'judge' is not one of" in refused("judge")
    assert "is the model that mines" in refused("untrained")
    assert "mine.rescore: no training comes after 'stage1'" in refused("stage1")
    recipe = parse(Recipe, {**settings, "mine": {"model": "untrained", "rescore": "models/judge"}}, "r")
    assert recipe.mine is not None
    assert recipe.mine.identity() == Mine(model="untrained").identity()  # what it reads counts by its content


def test_mining_depends_on_the_content_of_the_rescorer(tmp_path: Path, judge: Path) -> None:
    given = write_corpus(tmp_path, rows=40)

    def mined(**more: Any) -> str:
        recipe = parse(Recipe, {**given, "mine": {"model": "untrained", **more}}, "r")
        stage = declare(recipe, Run(str(tmp_path / "root"))).mined
        assert stage is not None
        return stage.hash

    copy = shutil.copytree(judge, tmp_path / "copy")
    hashes = [mined(), mined(rescore=str(judge)), mined(rescore=str(copy))]
    assert hashes[0] != hashes[1] == hashes[2]
    other = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**other, "layer_norm_eps": 1e-5}))
    assert mined(rescore=str(copy)) not in hashes
