"""A teacher's vectors computed once: the store, the stage that fills it, and the loss that they give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from f2llm_ray.base.errors import DataError, RecipeError, RunError
from f2llm_ray.data.batches.table import BatchTable
from f2llm_ray.data.keyed import META
from f2llm_ray.data.keys import shard_of
from f2llm_ray.data.schema import KEY, SourceFacts, key_numbers, query_text, text_key
from f2llm_ray.data.tokens.store import TokenStore
from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.vector_files import VectorWriter
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.recipe.files import parse
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.stage import Stage
from f2llm_ray.train import teacher_store
from f2llm_ray.train.loader import TrainBatch, read
from f2llm_ray.train.objective import StageLoss, Student
from f2llm_ray.train.teacher import TeacherVectors, check_online, learned_dims, teach, teacher_of
from f2llm_ray.train.teacher_store import TeacherStore
from f2llm_ray.train.teachers import PieceEncoder
from f2llm_ray.train.training import Training, check_held_out, write_batches
from f2llm_ray.train.vector_table import VectorTable, write_vector_table
from tests.corpus import write_corpus
from tests.encoders import encoder_folder
from tests.openai_server import openai_endpoint
from tests.tiny import tiny_model

STUDENT = 24
HIDDEN = 32


# The store.


@pytest.mark.parametrize("shards", [1, 3, 16])
def test_every_key_finds_its_vector_and_no_other_does(
    tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_store, "PIECE", 7)
    monkeypatch.setattr("f2llm_ray.data.keyed.OPEN_FILES", 2)
    keys = key_numbers(pa.array([text_key(str(n)) for n in range(100)], KEY))
    keys[:3, 0] = keys[0, 0]  # the same first half
    keys[5] = 0
    keys[6] = 2**64 - 1
    vectors = np.random.default_rng(0).normal(size=(100, 5)).astype(np.float16)
    vector_of = {tuple(key): vector for key, vector in zip(keys.tolist(), vectors, strict=True)}
    parts = [np.unique(part, axis=0).T for part in (keys[:60], keys[40:], keys[:1])]
    folder = Folder.at(str(tmp_path))
    counts = {shard: teacher_store.write_keys(folder, shard, shards, parts) for shard in range(shards)}
    assert counts == {shard: int((shard_of(keys, shards) == shard).sum()) for shard in range(shards)}
    for shard, piece, texts in teacher_store.pieces(counts):
        own = teacher_store.read_keys(folder, shard, piece)
        assert len(own) == texts <= 7
        name = teacher_store.piece_file(shard, piece)
        np.save(tmp_path / name, np.stack([vector_of[tuple(key)] for key in own.tolist()]))
    with pytest.raises(RunError, match=r"not a finished store.*store\.json"):
        TeacherStore(tmp_path)
    folder.write_json(META, {"shards": shards, "texts": 100, "dims": 5, "nested": True})
    store = TeacherStore(tmp_path)
    order = np.random.default_rng(1).integers(0, 100, 300)
    np.testing.assert_array_equal(store.lookup(keys[order]), vectors[order])
    other = key_numbers(pa.array([text_key("not there")], KEY))
    with pytest.raises(RunError, match=text_key("not there").hex()):
        store.lookup(np.concatenate([keys[:2], other]))


# The plan.


def settings(folder: Path) -> dict[str, Any]:
    found = write_corpus(folder, rows=120)
    found["stages"] = {}
    found["prune"] |= {"model": "untrained", "hidden": STUDENT}
    distill = {"teacher": "untrained", "epochs": 2, "max_steps": None}
    found["distill"] = {**found["distill"], **distill, "negatives": {"classification": 1, "clustering": 1}}
    return found


def recipe_of(given: dict[str, Any], **distill: Any) -> Recipe:
    return parse(Recipe, {**given, "distill": {**given["distill"], **distill}}, "r")


def taught_of(recipe: Recipe, folder: Path) -> Stage | None:
    """The teaching stage of a recipe, None where it has none."""
    return Pipeline(recipe, str(folder / "root")).graph.model("distilled").stage.parents.get("taught")


def test_vectors_are_shared_by_all_that_trains_on_the_same_batches(tmp_path: Path) -> None:
    given = settings(tmp_path)

    def taught(recipe: Recipe) -> str:
        stage = taught_of(recipe, tmp_path)
        assert stage is not None
        return stage.hash

    first = taught(recipe_of(given))
    assert taught(parse(Recipe, {**given, "prune": {**given["prune"], "layers": 2, "ffn": 16}}, "r")) == first
    others = {"lr": 1e-4, "mse_weight": 0.5, "cosine_weight": 1.0, "temperature": 0.1, "checkpoint_every": 3}
    assert taught(recipe_of(given, **others)) == first
    changed = {"epochs": 1, "global_batch": 8, "instructions": False, "projection": True, "similarity_weight": 1}
    for name, value in changed.items():
        assert taught(recipe_of(given, **{name: value})) != first, name
    assert taught(parse(Recipe, {**given, "prune": {**given["prune"], "hidden": 16}}, "r")) != first


def test_a_student_without_a_teacher_needs_no_vectors(tmp_path: Path) -> None:
    given = settings(tmp_path)
    graphs = [
        Pipeline(recipe_of(given, **distill), str(tmp_path / "root")).graph
        for distill in ({"mse_weight": 0.0}, {"teacher_vectors": "online"})
    ]
    (alone, online), untrained = (
        [graph.model(name).stage for graph in graphs] for name in ("distilled", "untrained")
    )
    assert "taught" not in {**alone.parents, **online.parents}
    assert untrained[1] in online.parents.values()
    assert untrained[0] not in alone.parents.values()


def test_a_teacher_that_is_no_model_is_refused(tmp_path: Path) -> None:
    given = settings(tmp_path)
    with pytest.raises(RecipeError, match=r"distill\.teacher: 'stagr1' is not one of \['untrained', 'pruned'\]"):
        recipe_of(given, teacher="stagr1")
    with pytest.raises(RecipeError, match="projection: nothing is projected"):
        recipe_of(given, projection=True, mse_weight=0.0, similarity_weight=1.0)


# The stage.


@dataclass(frozen=True)
class Made:
    """A prepared corpus, an untrained model that teaches, and its vectors."""

    given: dict[str, Any]
    recipe: Recipe
    pipeline: Pipeline
    prepared: Path
    model: Path
    student: Path
    out: Path
    facts: dict[str, Any]

    @property
    def batches(self) -> BatchTable:
        return BatchTable(self.out / "batches" / "train", ("pairs", "labels", "clusters"))

    def teach(self, recipe: Recipe, out: Path, teacher: Path | None = None, prepared: Path | None = None) -> Any:
        folders = {
            "prepared": prepared or self.prepared,
            "teacher": teacher or self.model,
            "student": self.student,
        }
        folders["out"] = out
        return teach(
            training_of(recipe),
            mined=None,
            instructions={name: source.query_instruction for name, source in recipe.sources.items()},
            max_tokens=recipe.data.max_tokens,
            shards=recipe.data.shards,
            **{name: Folder.at(str(f)) for name, f in folders.items()},
        )


def training_of(recipe: Recipe) -> Training:
    assert recipe.distill is not None
    return Training(
        stage="distilled",
        model_name="small-distilled",
        run_name=recipe.name,
        settings=recipe.distill,
        sources=facts_of(recipe),
        seed=recipe.seed,
        compute=recipe.compute,
    )


def facts_of(recipe: Recipe) -> dict[str, SourceFacts]:
    return {
        name: SourceFacts(source.task, source.query_instruction, source.weight)
        for name, source in recipe.sources.items()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Made:
    folder = tmp_path_factory.mktemp("taught")
    del ray_here
    given = settings(folder)
    recipe = recipe_of(given)
    pipeline = Pipeline(recipe, str(folder / "root"))
    pipeline.stage(pipeline.graph.prepare)
    for model in ("untrained", "pruned"):
        pipeline.model(model)
    out, facts = run_teaching(pipeline)
    prepared, untrained, pruned = (
        next((folder / "root").glob(f"{name}-*")) for name in ("prepare", "untrained", "pruned")
    )
    return Made(given, recipe, pipeline, prepared, untrained / "model", pruned / "model", out, facts)


def run_teaching(pipeline: Pipeline) -> tuple[Path, dict[str, Any]]:
    """Runs the teaching stage, and gives its folder and facts."""
    stage = pipeline.graph.model("distilled").stage.parents["taught"]
    pipeline.stage(stage)
    out = pipeline.run.folder(stage).local
    assert out is not None
    return out, json.loads((out / "manifest.json").read_text())["teaching"]


def keys_of(table: BatchTable) -> np.ndarray:
    found = [
        key_numbers(column)
        for entry in table.order()
        for batch in [table.batch(entry)]
        for column in (batch["query"], batch["passage"], batch["negatives"].flatten())
    ]
    return np.unique(np.concatenate(found), axis=0)


def test_the_store_has_the_teachers_vectors_of_all_texts_in_the_batches(made: Made) -> None:
    held_out = BatchTable(made.out / "batches" / "validation", made.batches.sources)
    keys = np.unique(np.concatenate([keys_of(made.batches), keys_of(held_out)]), axis=0)
    store, engine = TeacherStore(made.out / "vectors"), Engine(made.model)
    assert len(keys) == store.texts == made.facts["texts"] == made.facts["encoded_texts"]
    tokens = TokenStore(made.prepared / "tokens").lookup(keys)
    with torch.no_grad():
        expected = engine.encode(tokens)[:, :STUDENT].numpy()
    found = store.lookup(keys)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, rtol=6e-4, atol=1e-5)
    assert np.linalg.norm(expected, axis=1).min() > 2, "not unit vectors"


def test_what_was_encoded_is_not_encoded_again(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_teaching(Pipeline(made.recipe, made.pipeline.run.root.uri))
    assert "taught-distilled: finished before, skipped" in capsys.readouterr().out
    out = shutil.copytree(made.out, tmp_path / "cut off")
    pieces = sorted((out / "vectors").glob("*-*.npy"))
    lost = pieces[0]
    assert len(pieces) > 1
    written = {path: path.stat().st_ino for path in pieces[1:]}
    lost.unlink()
    (out / "vectors" / "store.json").unlink()
    facts = made.teach(made.recipe, out)
    assert facts["encoded_texts"] == len(np.load(lost)) < facts["texts"]
    assert "taught: encode" in capsys.readouterr().out
    assert {path: path.stat().st_ino for path in written} == written
    for path in (out / "vectors").iterdir():
        assert path.read_bytes() == (made.out / "vectors" / path.name).read_bytes(), path


def whole_vectors(made: Made, folder: Path) -> Path:
    """A store of all the teacher's dims, written in this process."""
    shutil.copytree(made.out / "vectors", folder, ignore=shutil.ignore_patterns("*-*", "store.json"))
    out, store = Folder.at(str(folder)), TeacherStore(made.out / "vectors")
    work = PieceEncoder(
        Folder.at(str(made.model)), Folder.at(str(made.prepared / "tokens")), out, 1, HIDDEN, "torch"
    )
    files = [folder / teacher_store.NAMES[0].format(shard) for shard in range(store.shards)]
    counts = {shard: np.load(file).shape[1] for shard, file in enumerate(files)}
    for shard, piece, texts in teacher_store.pieces(counts):
        work({"shard": shard, "piece": piece, "texts": texts})
    out.write_json(META, {"shards": store.shards, "texts": store.texts, "dims": HIDDEN, "nested": True})
    return folder


def losses(
    made: Made, recipe: Recipe, teacher: TeacherVectors, vectors: Path | None
) -> Iterator[tuple[TrainBatch, Any, Any]]:
    """Each batch with its loss and gradient, from the same student."""
    assert recipe.distill is not None
    loss = StageLoss(recipe.distill, facts_of(recipe), STUDENT, teacher)
    batches = read(made.batches, made.prepared / "tokens", rank=0, world=1, taught=vectors)
    for number, batch in enumerate(batches):
        width = STUDENT + (loss.projected_dims or 0)
        generator = torch.Generator().manual_seed(number)
        v = torch.randn(len(batch.tokens), width, generator=generator).requires_grad_()
        value, parts = loss(v, batch)
        value.backward()
        similar = {"similarity"} if recipe.distill.similarity_weight else set()
        assert set(parts.terms) == {"mse", "cosine"} | similar
        yield batch, value.detach(), v.grad


@pytest.mark.parametrize(("projection", "similarity"), [(False, 0.0), (False, 1.0), (True, 1.0)])
def test_cached_and_online_teachers_give_the_same_loss(
    made: Made, tmp_path: Path, *, projection: bool, similarity: float
) -> None:
    recipe = recipe_of(made.given, cosine_weight=1.0, similarity_weight=similarity, projection=projection)
    vectors, dims = made.out / "vectors", STUDENT
    if projection or similarity:  # all of the teacher's dims
        vectors, dims = whole_vectors(made, tmp_path / "whole"), HIDDEN
    assert recipe.distill is not None
    assert learned_dims(recipe.distill, (8, HIDDEN), STUDENT) == dims
    of = partial(teacher_of, tokens_per_pass=4096)
    cached, online = of(model=None, vectors=vectors), of(model=Folder.at(str(made.model)), vectors=None)
    assert cached is not None
    assert online is not None
    assert (cached.dims, online.dims) == (dims, HIDDEN)
    pairs = list(zip(losses(made, recipe, cached, vectors), losses(made, recipe, online, None), strict=True))
    assert {batch.source for (batch, _, _), _ in pairs} == {"pairs", "labels", "clusters"}
    for (_, one, of_one), (_, other, of_other) in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=0)
        assert (of_one - of_other).norm() < 1e-3 * of_other.norm()


def test_a_wider_teacher_is_cut_to_the_students_width(tmp_path: Path) -> None:
    """But whole where all of its dims are used; the width counts whether the recipe names it or not."""
    given = settings(tmp_path)

    def dims(*teacher: int, **distill: Any) -> int:
        changed = recipe_of(given, **distill).distill
        assert changed is not None
        return learned_dims(changed, teacher if len(teacher) > 1 else (8, *teacher), STUDENT)

    assert dims(1024) == STUDENT
    assert dims(16) == 16
    without = recipe_of(given).distill
    assert without is not None
    assert learned_dims(without, (1024,), STUDENT) == 1024, "its first dims say little"
    assert dims(1024, projection=True) == 1024
    assert dims(1024, similarity_weight=1) == 1024
    assert dims(1024, mse_weight=0, similarity_weight=1) == 1024
    unnamed = {**given, "prune": {**given["prune"], "hidden": None}}
    wide = {**unnamed, "backbone": {"shape": {**given["backbone"]["shape"], "hidden": 64}}}
    teacher = str(tiny_model(tmp_path / "other"))
    stages = [taught_of(recipe_of(one, teacher=teacher), tmp_path) for one in (unnamed, wide)]
    assert stages[0] != stages[1], "the backbone's width decides what is stored"


def test_sources_without_held_out_rows_are_trained_on(made: Made, tmp_path: Path) -> None:
    """A small source may have none by chance; with data.validation 0 no source has."""
    recipe, prepared = made.recipe, Folder.at(str(shutil.copytree(made.prepared, tmp_path / "prepared")))
    for name in recipe.sources:
        table = (prepared / "table").read_table(f"{name}.parquet")
        none = pa.array([False] * len(table))
        table = table.set_column(table.column_names.index("validation"), "validation", none)
        (prepared / "table").write_table(f"{name}.parquet", [table], table.schema)
    out = Folder.at(str(tmp_path / "batches"))
    write_batches(training_of(recipe), prepared=prepared, mined=None, out=out)
    trained, held_out = (
        BatchTable(tmp_path / "batches" / part, made.batches.sources) for part in ("train", "validation")
    )
    assert len(trained.order()) >= len(made.batches.order())
    assert list(read(held_out, made.prepared / "tokens", rank=0, world=1)) == []
    check_held_out(training_of(recipe), out)
    best = recipe_of(made.given, keep_best=True)
    with pytest.raises(
        RunError, match=r"stage 'distilled': keep_best needs held-out rows, and data\.validation held"
    ):
        check_held_out(training_of(best), out)


def test_more_steps_than_the_epochs_have_see_the_rows_again(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def order(folder: Path, **distill: Any) -> np.ndarray:
        training = training_of(recipe_of(made.given, epochs=1, **distill))
        write_batches(training, prepared=Folder.at(str(made.prepared)), mined=None, out=Folder.at(str(folder)))
        return BatchTable(folder / "train", made.batches.sources).order()

    once = order(tmp_path / "once")
    again = order(tmp_path / "again", max_steps=2 * len(once) + 1)
    assert len(again) == 2 * len(once) + 1
    np.testing.assert_array_equal(again[: len(once)], once)
    assert [int((again["epoch"] == epoch).sum()) for epoch in range(3)] == [len(once), len(once), 1]
    assert f"distilled: {len(again)} steps take 3 epochs" in capsys.readouterr().out
    assert len(order(tmp_path / "few", max_steps=3)) == 3
    check_held_out(training_of(made.recipe), Folder.at(str(tmp_path / "once")))
    assert "held-out rows: validation loss and score say little" in capsys.readouterr().out


def test_a_teacher_of_another_run_width_and_tokenizer(made: Made, tmp_path: Path) -> None:
    """Its own tokenizer reads the texts, so its vectors are its engine's; it cannot run beside the student."""
    teacher = tiny_model(tmp_path / "other", hidden=16)
    recipe = recipe_of(made.given, teacher=str(teacher), epochs=1)
    out, facts = run_teaching(Pipeline(recipe, made.pipeline.run.root.uri))
    assert facts["own_tokenizer"]
    assert facts["dims"] == 16
    texts = [line["p"] for line in map(json.loads, (made.prepared.parent.parent / "pairs.jsonl").open())][:20]
    engine = Engine(teacher)
    with torch.no_grad():
        expected = engine.encode(engine.tokenize(texts, max_tokens=32)).numpy()
    found = TeacherStore(out / "vectors").lookup(key_numbers(pa.array([text_key(text) for text in texts], KEY)))
    np.testing.assert_allclose(found, expected, rtol=6e-4, atol=1e-5)

    with pytest.raises(
        RunError, match=r"not the tokenizer of the prepared data.*set distill\.teacher_vectors to cached"
    ):
        check_online(Folder.at(str(made.prepared)), Folder.at(str(teacher)))
    without = shutil.copytree(made.prepared, tmp_path / "prepared", ignore=shutil.ignore_patterns("rows"))
    with pytest.raises(
        RunError, match="another tokenizer or other prompts than the prepared data and needs its texts"
    ):
        made.teach(recipe, tmp_path / "none", teacher, without)
    # The student has 24 dims, the teacher 16: a map from one to the other is trained with it.
    assert recipe.distill is not None
    known = teacher_of(model=None, vectors=out / "vectors", tokens_per_pass=4096)
    assert StageLoss(recipe.distill, facts_of(recipe), STUDENT, known).projected_dims == 16
    assert StageLoss(recipe.distill, facts_of(recipe), 16, known).projected_dims is None


# Teachers from elsewhere.


@dataclass(frozen=True)
class Texts:
    """What a row of the pairs reads, and the keys under which the student's stage knows it."""

    queries: list[str]
    passages: list[str]
    keys: np.ndarray

    @staticmethod
    def of(made: Made, count: int = 20) -> Texts:
        lines = list(map(json.loads, (made.prepared.parent.parent / "pairs.jsonl").open()))[:count]
        queries, passages = [line["q"] for line in lines], [line["p"] for line in lines]
        instruction = made.recipe.sources["pairs"].query_instruction
        keys = [text_key(query_text(query, instruction)) for query in queries] + [text_key(p) for p in passages]
        return Texts(queries, passages, key_numbers(pa.array(keys, KEY)))


def vectors_of(made: Made, teacher: str, **distill: Any) -> tuple[TeacherStore, dict[str, Any]]:
    recipe = recipe_of(made.given, teacher=teacher, epochs=1, **distill)
    out, facts = run_teaching(Pipeline(recipe, made.pipeline.run.root.uri))
    return TeacherStore(out / "vectors"), facts


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_folder_of_sentence_transformers_teaches(made: Made, tmp_path: Path, pooling: str) -> None:
    """By the engine, or by the package where the engine has no such pooling: with its own prompts alone."""
    from sentence_transformers import SentenceTransformer

    prompts = {"query": "ask: ", "passage": "read: "}
    folder = encoder_folder(tmp_path / "model", "xlm-roberta", pooling=pooling, prompts=prompts)
    store, facts = vectors_of(made, str(folder))
    assert facts["dims"] == 32, "all of them: its first dims were not trained"
    assert not store.nested
    texts = Texts.of(made)
    whole = [f"ask: {q}" for q in texts.queries] + [f"read: {p}" for p in texts.passages]
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = made.recipe.data.max_tokens if pooling == "mean" else model.max_seq_length
    expected = model.encode(whole, prompt="", normalize_embeddings=True)
    found = store.lookup(texts.keys).astype(np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    # A student of 24 dims is projected to its 32.
    assert made.recipe.distill is not None
    known = teacher_of(model=None, vectors=store._store.folder, tokens_per_pass=4096)  # noqa: SLF001
    assert StageLoss(made.recipe.distill, facts_of(made.recipe), STUDENT, known).projected_dims == 32


def test_an_endpoint_teaches_and_is_asked_once_for_each_text(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Engine(tiny_model(tmp_path / "behind", hidden=16))
    monkeypatch.setattr("f2llm_ray.train.teachers.CHUNK", 64)
    with openai_endpoint(lambda texts: engine.embed_counted(texts)[0]) as endpoint:
        teacher = f"{endpoint.url}#behind"
        prompts = {"query": "q: ", "document": "d: "}
        endpoint.most = 100
        with pytest.raises(RunError, match=r"behind does not embed.*quota is used up"):
            vectors_of(made, teacher, teacher_prompts=prompts)
        before = len(endpoint.asked)
        assert before
        endpoint.most = None
        store, facts = vectors_of(made, teacher, teacher_prompts=prompts)
        assert len(endpoint.asked) == len(set(endpoint.asked)) == facts["texts"] == store.texts
        assert facts["encoded_texts"] == facts["texts"] - before, "what came before the failure is kept"
    said = capsys.readouterr().out
    assert f"{teacher} is asked for {facts['texts']:,} texts of about" in said
    texts = Texts.of(made)
    whole = [f"q: {q}" for q in texts.queries] + [f"d: {p}" for p in texts.passages]
    np.testing.assert_allclose(store.lookup(texts.keys), engine.embed_counted(whole)[0], atol=1e-3)
    with pytest.raises(RecipeError, match=r"expected URL#NAME"):
        recipe_of(made.given, teacher="http://127.0.0.1:1/v1")
    with pytest.raises(RecipeError, match="online needs a model folder"):
        recipe_of(made.given, teacher=teacher, teacher_vectors="online")


def test_a_table_of_vectors_teaches(made: Made, tmp_path: Path) -> None:
    rows = made.prepared / "rows"
    tables = [pq.read_table(file, columns=["query", "passage", "negatives"]) for file in rows.glob("*.parquet")]
    columns = pa.concat_tables(tables)
    texts = {text for name in ("query", "passage") for text in columns[name].to_pylist()}
    texts |= {text for negatives in columns["negatives"].to_pylist() for text in negatives}
    ordered = sorted(texts)
    vectors = np.random.default_rng(0).normal(size=(len(ordered), 12)).astype(np.float32)
    half = len(ordered) // 2
    (tmp_path / "table").mkdir()
    for name, part in (("a", slice(0, half)), ("b", slice(half, None))):
        content = {"text": ordered[part], "vector": list(vectors[part])}
        pq.write_table(pa.table(content), tmp_path / "table" / f"{name}.parquet")
    store, _ = vectors_of(made, f"{tmp_path}/table/*.parquet")
    vector_of = dict(zip(ordered, vectors, strict=True))
    asked = Texts.of(made)
    expected = [vector_of[text] for text in (*asked.queries, *asked.passages)]
    np.testing.assert_allclose(store.lookup(asked.keys), expected, rtol=1e-3)
    pq.write_table(pa.table({"text": ordered[:half], "vector": list(vectors[:half])}), tmp_path / "less.parquet")
    with pytest.raises(
        RunError, match=r"the table has no vector of \d+ of \d+ texts, such as '.*expected one for"
    ):
        vectors_of(made, str(tmp_path / "less.parquet"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"text": ["a"], "embedding": [[1.0]]},
            r"found the columns \['text', 'embedding'\], expected text",
        ),
        ({"text": ["a", "b"], "vector": [[1.0], [1.0, 2.0]]}, r"found vectors of \[1, 2\] numbers"),
        ({"text": ["a", None], "vector": [[1.0], [2.0]]}, "a row without a text or a vector"),
        ({"text": ["a"], "vector": [[float("nan")]]}, "a vector that is not finite"),
        ({"text": ["a"], "vector": ["1 2"]}, "vector is string, expected a list"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(content), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=rf"t\.parquet.*{message}"):
        write_vector_table(str(tmp_path / "t.parquet"), Folder.at(str(tmp_path / "out")))


def test_the_last_row_of_a_text_counts(tmp_path: Path) -> None:
    content = {"text": ["a", "b", "a"], "vector": [[1.0], [2.0], [3.0]]}
    pq.write_table(pa.table(content), tmp_path / "t.parquet", row_group_size=2)
    out = Folder.at(str(tmp_path / "out"))
    assert write_vector_table(str(tmp_path / "t.parquet"), out) == 1
    assert VectorTable(out).embed_counted(["b", "a"])[0].tolist() == [[2.0], [3.0]]


def test_vectors_too_long_for_float16_are_refused(made: Made, tmp_path: Path) -> None:
    model = shutil.copytree(made.model, tmp_path / "long")
    weights = load_file(model / "model.safetensors")
    weights["norm.weight"] *= 1e6
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    encoder = VectorWriter(Folder.at(str(model)), Folder.at(str(made.prepared / "tokens")), 1, unit=False)
    with pytest.raises(RunError, match="not finite for 9 of 9 texts in float16"):
        encoder.write(keys_of(made.batches)[:9], Folder.at(str(tmp_path / "none")), "0.npy")


def test_the_projection_is_trained_and_begins_as_the_first_dims(made: Made) -> None:
    engine = Engine(made.model)
    student = Student(engine.forward.backbone, "last", 4096, projected_dims=40)
    tokens = engine.tokenize(["one", "and another"])
    both = student(tokens)
    assert both.shape == (2, HIDDEN + 40)
    torch.testing.assert_close(both[:, :HIDDEN], both[:, HIDDEN : 2 * HIDDEN])
    assert not both[:, 2 * HIDDEN :].any()
    both[:, HIDDEN:].sum().backward()
    assert student.projection is not None
    assert student.projection.weight.grad is not None
    assert not any("projection" in name for name in student.backbone.state_dict())
