"""The whole pipeline, for real: Ray Data, two DeepSpeed workers under Ray Train, a kill in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.drawn import pair_tokens
from f2llm_ray.data.schema import key_numbers
from f2llm_ray.data.tokens.store import TokenStore
from f2llm_ray.engine.engine import Engine
from f2llm_ray.model.checkpoint import load_backbone
from f2llm_ray.model.pair_embeddings import MOST_PAIRS, pair_embeddings
from f2llm_ray.model.settings import Backbone
from f2llm_ray.model.sizes import Shape
from f2llm_ray.model.vocabulary import load_map, remap
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.pipeline.work import make_untrained
from f2llm_ray.recipe.files import load_recipe
from f2llm_ray.run.folder import Folder
from f2llm_ray.serve.served_model import Arguments, find_model
from f2llm_ray.train import checkpoints
from tests.corpus import write_corpus, write_recipe
from tests.jobs import start_job

REPO = Path(__file__).parents[2]
OUTPUT_STAYS = [
    "stages.stage1.engine.loader_prefetch=1",
    "stages.stage1.keep_checkpoints=5",
    "stages.stage1.checkpoint_every=20",
    "stages.stage1.validation_rows=16",
    "evaluation.during_training=false",
]
"""Settings whose change does not change a byte of the model."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Path:
    """Stage 1 is long enough, some 50 steps of two batches, to be killed twice on its way.

    Checkpoints are few: Ray Train registers one in about two seconds, however small (ray 2.60).
    """
    corpus = write_corpus(folder)
    corpus["stages"]["stage1"] |= {"epochs": 6, "accumulate": 2, "checkpoint_every": 8}
    corpus["prune"] |= {"vocabulary": "used"}
    # Ever wilder steps: the best checkpoint is not the last one.
    corpus["distill"] |= {"checkpoint_every": 2, "keep_best": True, "lr": 100, "warmup_steps": 6}
    corpus["evaluation"]["during_training"] = True
    return write_recipe(folder, corpus)


def seals(root: Path) -> set[Path]:
    """The sealed parts that the second worker has written to stage 1's checkpoints."""
    return set(root.glob("stage1-*/ray_train/checkpoint_*/part-00001-of-00002.json"))


def until_another_checkpoint(root: Path, process: subprocess.Popen[str]) -> None:
    before, end = seals(root), time.monotonic() + 200
    while not seals(root) - before:
        assert process.poll() is None, process.communicate()[0]
        assert not list(root.glob("stage1-*/model")), "stage 1 ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.02)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the training workers below a process."""
    parents, workers = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if "RayTrainWorker" in (folder / "cmdline").read_text():
                workers.append(int(folder.name))
        except OSError:
            continue

    def below(pid: int) -> bool:
        return pid == process.pid or (pid in parents and below(parents[pid]))

    return sorted(filter(below, workers))


@pytest.fixture(scope="module")
def finished(folder: Path, recipe: Path) -> dict[str, Any]:
    """A run that was killed in stage 1 and started again, and then lost one of its workers."""
    root = folder / "root"
    first = start_job("pipeline", "--recipe", recipe, "--root", root)
    until_another_checkpoint(root, first)
    os.killpg(first.pid, signal.SIGKILL)
    killed = first.communicate()[0]
    time.sleep(2)
    left = shutil.copytree(next(root.glob("stage1-*")), folder / "left" / next(root.glob("stage1-*")).name)
    second = start_job("pipeline", "--recipe", recipe, "--root", root)
    until_another_checkpoint(root, second)
    os.kill(workers_of(second)[-1], signal.SIGKILL)
    output = second.communicate(timeout=400)[0]
    assert second.returncode == 0, output
    return {"root": root, "killed": killed, "output": output, "left": left}


@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_and_reports(finished: dict[str, Any]) -> None:
    output, root = finished["output"], finished["root"]
    assert "prepare: finished before, skipped" in output
    assert output.count("stage1: goes on from step") == 2, output
    report = json.loads((root / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["untrained", "stage1", "pruned", "distilled"]
    for model in report["models"]:
        scores = model["scores"]["held"]
        full = {"untrained": 32, "stage1": 32, "pruned": 24, "distilled": 24}[model["name"]]
        assert list(map(int, scores)) == [full, full // 2, full // 4, full // 8]
        assert set(scores[str(full)]) == {"ndcg@10", "acc@1", "recall@10", "ci", "macro", "macro_ci"}
    assert json.loads(next(root.glob("stage1-*/deepspeed.json")).read_text())["train_batch_size"] == 16
    assert (root / "report.html").stat().st_size > 10_000
    assert "distilled" in output


def test_a_cut_vocabulary_goes_with_the_model_that_is_taught(finished: dict[str, Any]) -> None:
    root = finished["root"]
    parent, taught = (Engine(next(root.glob(f"{name}-*/model"))) for name in ("stage1", "distilled"))
    texts = pq.read_table(next(root.glob("prepare-*/rows"))).filter(pc.field("drop").is_null())
    passages = texts["passage"].to_pylist()
    mapped = remap(parent.tokenize(passages), load_map(Folder.at(str(next(root.glob("distilled-*/model"))))))
    assert [ids.tolist() for ids in mapped] == [ids.tolist() for ids in taught.tokenize(passages)]
    assert (next(root.glob("distilled-*/model")) / "f2llm" / "calibration.safetensors").is_file()
    card = find_model(Arguments(root=str(root))).card
    scores, types = card.scores, card.types["held"]
    assert set(types) == set(card.dims)
    assert all(set(by_type) == {"float", "int8", "binary"} for by_type in types.values())
    assert types[24]["float"] == pytest.approx(scores["held"]["24"]["ndcg@10"], abs=2e-6)
    assert all("ci" in facts for by_dim in scores.values() for facts in by_dim.values())
    assert scores


def test_a_random_model_may_start_from_the_pairs_that_it_is_trained_on(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    prepared, out = Folder.at(str(next(finished["root"].glob("prepare-*")))), Folder.at(str(tmp_path))
    queries, passages = pair_tokens(["pairs", "labels"], 3, prepared, 10_000)
    rows = pa.concat_tables(
        pq.read_table(Path(prepared.path) / "table" / f"{name}.parquet") for name in ("pairs", "labels")
    )
    trained = rows.filter(pc.invert(rows["validation"]))
    assert 0 < trained.num_rows < rows.num_rows
    store = TokenStore(Path(prepared.path) / "tokens")
    expected = zip(
        *(store.lookup(key_numbers(trained[name])) for name in ("query_key", "passage_key")), strict=True
    )
    found = [(a.tolist(), b.tolist()) for a, b in zip(queries, passages, strict=True)]
    assert sorted(found) == sorted((a.tolist(), b.tolist()) for a, b in expected)
    shape = Shape(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=16)
    backbone, names = Backbone(shape=shape, embeddings_from="pairs"), ["pairs", "labels"]
    make_untrained(backbone, 3, sources=names, model_name="m", max_tokens=64, prepared=prepared, out=out)
    table_vd = load_backbone(tmp_path / "model").get_input_embeddings().weight.detach()
    queries, passages = pair_tokens(names, 3, prepared, MOST_PAIRS)
    vectors_vd = pair_embeddings(queries, passages, *table_vd.shape, seed=3).float()
    some_v = vectors_vd.any(dim=1)
    torch.testing.assert_close(torch.nn.functional.normalize(table_vd, dim=1)[some_v], vectors_vd[some_v])


def test_the_best_checkpoint_is_exported_where_it_is_asked_for(finished: dict[str, Any]) -> None:
    root = finished["root"]
    training = json.loads(next(root.glob("distilled-*/training.json")).read_text())
    losses = dict(training["validation"])
    assert list(losses) == [2, 4, 6]
    best = min(losses, key=losses.__getitem__)
    assert training["exported_step"] == best < 6
    folder = Folder.at(str(next(root.glob("distilled-*/ray_train"))))
    kept = {checkpoint.step: checkpoint for checkpoint in checkpoints.listed(folder)}[best]
    parts = [load_file(path) for path in Path(kept.folder.path).glob("*.safetensors")]
    written = {name: value for part in parts for name, value in part.items() if name.startswith("weight/")}
    exported = weights(root, "distilled")
    assert len(written) == len(exported)
    for name, value in exported.items():
        assert torch.equal(written[f"weight/backbone.{name}"], value)
    # The checkpoint was measured beside training as the exported model is after it.
    report = json.loads((root / "report.json").read_text())
    curve = dict(report["training"]["distilled"]["checkpoint_scores"]["ndcg@10 on held"])
    full = next(iter(report["models"][-1]["scores"]["held"].values()))
    assert set(curve) == {2, 4}
    assert curve[best] == full["ndcg@10"]


def test_every_row_is_accounted_for(finished: dict[str, Any]) -> None:
    report = json.loads((finished["root"] / "report.json").read_text())
    steps = {step["step"]: step for step in report["rows"]}
    lines = len((finished["root"].parent / "pairs.jsonl").read_text().splitlines())
    assert steps["read"]["in"] == lines + 60 + 40
    assert steps["clean"]["dropped"] == {"query too long": 1}
    assert steps["dedup"]["dropped"]["same row"] >= 3
    for step, following in zip(report["rows"], report["rows"][1:], strict=False):
        assert step["in"] - step["out"] == sum(step["dropped"].values())
        assert following["in"] == step["out"]
    assert sum(report["languages"].values()) == report["rows"][-1]["out"]


def test_no_held_out_query_is_trained_on(finished: dict[str, Any]) -> None:
    import pyarrow.parquet as pq

    prepared = next(finished["root"].glob("prepare-*"))
    held = set(pq.read_table(next(finished["root"].glob("set-held-*/queries.parquet")))["text"].to_pylist())
    for path in sorted((prepared / "rows").glob("*.parquet")):
        rows = pq.read_table(path)
        kept = [row["query"] for row in rows.to_pylist() if row["drop"] is None]
        assert not held & set(kept)


def test_the_store_holds_what_the_tokenizer_says(finished: dict[str, Any]) -> None:
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    from f2llm_ray.data.schema import key_numbers, query_text

    prepared = next(finished["root"].glob("prepare-*"))
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer" / "tokenizer.json"))
    store = TokenStore(prepared / "tokens")
    instruction = "Classify the topic of the given text."
    table = pq.read_table(prepared / "table" / "labels.parquet")
    texts = {
        row["row_key"]: row
        for path in (prepared / "rows").glob("*.parquet")
        for row in pq.read_table(path).to_pylist()
    }
    rows = [texts[key] for key in table["row_key"].to_pylist()]
    wanted = {
        "query_key": [row["query"] for row in rows],
        "instructed_key": [query_text(row["query"], instruction) for row in rows],
        "passage_key": [row["passage"] for row in rows],
    }
    for column, expected in wanted.items():
        found = store.lookup(key_numbers(table[column]))
        for ids, text in zip(found, expected, strict=True):
            whole = tokenizer.encode(text).ids
            assert ids.tolist() == (whole if len(whole) <= 32 else [*whole[:31], whole[-1]])
    labels = set(table["passage_key"].to_pylist())
    for own, negatives in zip(table["passage_key"].to_pylist(), table["negative_keys"].to_pylist(), strict=True):
        assert set(negatives) == labels - {own}


def with_stages(root: Path, finished: Path, *stages: str) -> Path:
    """A new root with some finished stages, without their checkpoints."""
    for stage in stages:
        source = next(finished.glob(f"{stage}-*"))
        shutil.copytree(source, root / source.name, ignore=shutil.ignore_patterns("ray_train"))
    return root


def weights(root: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(next(root.glob(f"{stage}-*/model/model.safetensors")))


@pytest.mark.timeout(300)
def test_an_undisturbed_run_ends_with_the_same_weights(
    finished: dict[str, Any], folder: Path, recipe: Path, ray_here: None
) -> None:
    """Killed and resumed, or in one go with other settings that are no output's: equal to the last bit."""
    del ray_here
    root = with_stages(folder / "undisturbed", finished["root"], "prepare", "untrained")
    Pipeline(load_recipe(str(recipe), OUTPUT_STAYS), str(root)).model("stage1")
    ours, theirs = weights(root, "stage1"), weights(finished["root"], "stage1")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    files = [next(run.glob("stage1-*/training.json")) for run in (root, finished["root"])]
    losses = [json.loads(file.read_text())["loss"] for file in files]
    assert losses[0] == losses[1]
    steps, batches = len(losses[0]), len(np.load(next(root.glob("stage1-*/batches/train/order.npy"))))
    assert steps == -(-batches // 2)
    assert np.mean([loss for _, loss in losses[0][-5:]]) < np.mean([loss for _, loss in losses[0][:5]])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_chain_makes_three_sizes_in_one_root(
    finished: dict[str, Any], folder: Path, recipe: Path, ray_here: None
) -> None:
    """Pruned and distilled twice, each from the model before it; what is there is not trained again."""
    del ray_here
    root = with_stages(folder / "chain", finished["root"], "prepare", "untrained", "stage1")
    content = yaml.safe_load(recipe.read_text())
    learning = {
        **content.pop("distill"),
        "kind": "distill",
        "teacher_vectors": "online",
        "max_steps": 2,
        "lr": 1e-3,
        "keep_best": False,
    }
    del content["prune"]
    content["stages"] |= {
        "cut": {"kind": "prune", "model": "stage1", "layers": 1, "hidden": 24, "calibration_rows": 30},
        "middle": {**learning, "model": "cut", "teacher": "stage1"},
        "recut": {"kind": "prune", "model": "middle", "hidden": 16, "ffn": 32, "calibration_rows": 30},
        "small": {**learning, "model": "recut", "teacher": "middle"},
    }
    chain = write_recipe(root, content)
    pipeline = Pipeline(load_recipe(str(chain)), str(root))
    for name in ("cut", "middle", "recut", "small"):
        pipeline.model(name)
    assert len(list(root.glob("stage1-*"))) == 1
    sizes = [sum(map(torch.Tensor.numel, weights(root, name).values())) for name in ("stage1", "middle", "small")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    for cut, taught, teacher in (("cut", "middle", "stage1"), ("recut", "small", "middle")):
        before, after = weights(root, cut), weights(root, taught)
        assert {n: v.shape for n, v in before.items()} == {n: v.shape for n, v in after.items()}
        assert any(not torch.equal(before[name], after[name]) for name in before)
        manifest = json.loads(next(root.glob(f"{taught}-*/manifest.json")).read_text())
        assert manifest["parents"]["teacher"].startswith(f"{teacher}-")


@pytest.mark.timeout(300)
def test_fewer_workers_go_on_from_the_same_checkpoint(
    finished: dict[str, Any], folder: Path, recipe: Path, ray_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """One worker takes over from two: only the order of sums changes. One cut off later is passed over."""
    del ray_here
    root = with_stages(folder / "narrow", finished["root"], "prepare", "untrained")
    place = shutil.copytree(finished["left"], root / finished["left"].name)
    sound = checkpoints.listed(Folder.at(str(place / "ray_train")))[0]
    broken = shutil.copytree(sound.folder.path, place / "ray_train" / "checkpoint_later")
    for path in broken.glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "step": sound.step + 1}))
    part = broken / "part-00001-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    Pipeline(load_recipe(str(recipe), ["compute.workers=1"]), str(root)).model("stage1")
    output = capsys.readouterr().out
    assert "checkpoint checkpoint_later of step" in output
    assert f"stage1: goes on from step {sound.step}" in output
    narrow, wide = (
        json.loads(next(run.glob("stage1-*/training.json")).read_text()) for run in (root, finished["root"])
    )
    assert (narrow["workers"], wide["workers"]) == (1, 2)
    # A text that both workers had is now encoded once.
    assert 0.95 * wide["tokens"] < narrow["tokens"] <= wide["tokens"]
    assert [step for step, _ in narrow["loss"]] == [step for step, _ in wide["loss"]]
    np.testing.assert_allclose([loss for _, loss in narrow["loss"]], [loss for _, loss in wide["loss"]], rtol=1e-2)


@pytest.mark.timeout(200)
def test_a_loss_that_is_no_number_stops_at_once(
    finished: dict[str, Any], folder: Path, recipe: Path, ray_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told with step, batch and source; not tried again, since it would end the same way."""
    del ray_here
    root = with_stages(folder / "diverged", finished["root"], "prepare", "untrained")
    pipeline = Pipeline(load_recipe(str(recipe), ["stages.stage1.lr=1e15"]), str(root))
    with pytest.raises(RunError, match=r"stage 'stage1', step \d+: the loss is .* batch \d+ of source '"):
        pipeline.model("stage1")
    assert "goes on" not in capsys.readouterr().out
    seen = json.loads(next(root.glob("stage1-*/failure.json")).read_text())
    order = np.load(next(root.glob("stage1-*/batches/train/order.npy")))
    sources = ["pairs", "labels", "clusters"]
    entries = order[2 * seen["step"] : 2 * seen["step"] + 2]
    batches = [(int(e["epoch"]), int(e["batch"]), sources[int(e["source"])]) for e in entries]
    assert (seen["epoch"], seen["batch"], seen["source"]) in batches
    assert not list(root.glob("stage1-*/model"))


def test_other_worker_counts_prepare_the_same_bytes(
    finished: dict[str, Any], folder: Path, recipe: Path, ray_here: None
) -> None:
    """The ids, tokens and sets are those of the first run, which another process tree made."""
    del ray_here
    again = Pipeline(load_recipe(str(recipe)), str(folder / "again"))
    again.job("prepare")
    first, second = (next(r.glob("prepare-*")) for r in (finished["root"], folder / "again"))
    timed = {"manifest.json", "card.html", "card.json"}
    names = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file() and p.name not in timed)
    assert names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def refused(folder: Path, recipe: Path, *arguments: object) -> str:
    process = start_job("prepare", "--recipe", recipe, "--root", folder / "bad", *arguments)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 1, output
    assert "Traceback" not in output
    return output


def test_bad_input_gets_one_clear_message(folder: Path, recipe: Path, ray_here: None) -> None:
    """Bad recipes are refused before Ray starts, bad rows by the file and line that hold them."""
    del ray_here
    assert "unknown key" in refused(folder, recipe, "--set", "data.max_token=3")
    broken = folder / "broken.jsonl"
    broken.write_text('{"q": "a", "p": "b", "lang": "deu"}\n{"q": "", "p": "b", "lang": "deu"}\n')
    output = refused(folder, recipe, "--set", f"sources.pairs.paths=[{broken}]")
    assert "broken.jsonl" in output
    assert "2" in output
    assert "error:" in output


def test_jobs_say_what_must_run_first(folder: Path, recipe: Path) -> None:
    process = start_job("prune", "--recipe", recipe, "--root", folder / "empty")
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 1
    assert "is not finished; run `f2llm " in output
    assert yaml.safe_load(recipe.read_text())["name"] == "small"
