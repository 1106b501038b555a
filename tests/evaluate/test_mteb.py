"""A model through mteb: its vectors are the engine's, its prompts the paper's, and mteb reads its results."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mteb
import numpy as np
import pytest
import yaml
from mteb.mocks.mock_tasks.bitext_mining import MockBitextMiningTask
from mteb.mocks.mock_tasks.retrieval import MockRetrievalTask
from mteb.mocks.mock_tasks.sts import MockSTSTask
from mteb.models.models_protocols import EncoderProtocol
from mteb.types import PromptType
from ray import cloudpickle

from f2llm_ray.base.errors import RunError
from f2llm_ray.engine.engine import Engine
from f2llm_ray.evaluate.mteb_model import MtebEncoder, instruction_of, model_meta, prompts_of
from f2llm_ray.evaluate.mteb_run import _Encoder, find_tasks, run_mteb
from f2llm_ray.model.checkpoint import fingerprint
from f2llm_ray.run.folder import Folder
from tests.tiny import LINES, tiny_model

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it


class Broken(MockSTSTask):
    """A task whose data cannot be had."""

    metadata = MockSTSTask().metadata.model_copy(update={"name": "Broken"})

    def load_data(self, *_: Any, **__: Any) -> None:
        raise OSError("no such data set")


class Late(MockSTSTask):
    """A task that fails after its texts were encoded."""

    metadata = MockSTSTask().metadata.model_copy(update={"name": "Late"})

    def load_data(self, *_: Any, **__: Any) -> None:
        super().load_data()

    def _evaluate_subset(self, model: Any, *_: Any, **__: Any) -> Any:
        model.encode([{"text": LINES}], task_metadata=self.metadata, prompt_type=None)
        raise ValueError("after all vectors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("mteb") / "model")


def task(kind: str, prompt: Any = None) -> Any:
    return SimpleNamespace(type=kind, prompt=prompt)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (task("STS"), "Retrieve semantically similar text."),
        (task("BitextMining"), "Retrieve translations of the following text."),
        (task("Classification"), "Classify the topic of the given text."),
        (task("Retrieval"), "Given a question, retrieve passages that can help answer the question."),
        (task("Retrieval", {"query": "Find the law"}), "Find the law"),
        (task("Classification", "Name the feeling"), "Name the feeling"),
    ],
)
def test_prompts_are_the_tasks_own_or_the_papers(asked: Any, said: str) -> None:
    assert instruction_of(asked) == said


def test_vectors_are_the_engines(folder: Path) -> None:
    model, engine = MtebEncoder(folder), Engine(folder)
    assert isinstance(model, EncoderProtocol)
    batches = [{"text": LINES[:4]}, {"text": LINES[4:]}]
    queries = model.encode(batches, task_metadata=task("STS"), prompt_type=None)
    prompt = "Instruct: Retrieve semantically similar text.\nQuery: "
    np.testing.assert_allclose(queries, engine.embed(LINES, prompt=prompt), atol=1e-6)
    documents = model.encode(batches, task_metadata=task("Retrieval"), prompt_type=PromptType.document)
    np.testing.assert_allclose(documents, engine.embed(LINES), atol=1e-6)
    assert np.abs(queries - documents).max() > 1e-3


def test_a_model_without_instructions_has_its_own_prompts(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    facts = json.loads((copy / "f2llm.json").read_text())
    prompts = {"query": "query: ", "document": "passage: "}
    (copy / "f2llm.json").write_text(json.dumps({**facts, "instructions": False, "prompts": prompts}))
    model, engine = MtebEncoder(copy), Engine(copy)
    for kind, prompt in ((PromptType.query, "query: "), (PromptType.document, "passage: "), (None, "query: ")):
        found = model.encode([{"text": LINES}], task_metadata=task("Retrieval"), prompt_type=kind)
        np.testing.assert_allclose(found, engine.embed(LINES, prompt=prompt), atol=1e-6)


@pytest.mark.usefixtures("ray_here")
def test_mteb_loads_what_a_run_wrote_and_a_second_run_does_nothing(folder: Path, tmp_path: Path) -> None:
    tasks = [MockRetrievalTask(), Broken(), MockBitextMiningTask(), MockSTSTask()]
    with pytest.raises(RunError, match=r"failed.*\nBroken: OSError: no such data set$"):
        run_mteb(str(folder), tasks, str(tmp_path), workers=2)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("Mock*.json")}
    scores = run_mteb(str(folder), [task for task in tasks if task.metadata.name != "Broken"], str(tmp_path))
    assert {file: file.stat().st_mtime_ns for file in files} == files
    assert list(scores) == ["MockBitextMiningTask", "MockRetrievalTask", "MockSTSTask"]
    meta, cache = model_meta(folder), mteb.ResultCache(tmp_path)
    assert (meta.name, meta.revision) == ("f2llm_ray/tiny", fingerprint(Folder.at(str(folder))))
    for name, score in scores.items():
        loaded = cache.load_task_result(name, meta)
        assert loaded is not None
        assert loaded.get_score() == pytest.approx(score)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
def test_two_workers_score_as_one_and_go_on_within_a_task(folder: Path, tmp_path: Path) -> None:
    """A large task is shared: its pieces go to all workers, and those that are there are not encoded again."""
    found = {
        workers: run_mteb(
            str(folder),
            [MockBitextMiningTask(), MockRetrievalTask()],
            str(tmp_path / str(workers)),
            workers=workers,
        )
        for workers in (1, 2)
    }
    with pytest.raises(RunError, match="Late: ValueError: after all vectors"):
        run_mteb(str(folder), [Late()], str(tmp_path / "1"), workers=2)
    with pytest.raises(RunError, match=r"its results are with the instructions 'own', and 'f2llm-v2' are asked"):
        run_mteb(str(folder), [Late()], str(tmp_path / "1"), prompts="f2llm-v2")
    assert found[1] == found[2]
    for task in (MockBitextMiningTask(), MockRetrievalTask()):
        (alone,) = mteb.evaluate(MtebEncoder(folder), task, cache=None, co2_tracker=False).task_results
        assert found[2][task.metadata.name] == pytest.approx(alone.get_score(), abs=1e-6)
    assert not list((tmp_path / "2").glob("vectors/*/*")), "what is finished needs no vectors"
    (piece,) = (tmp_path / "1").glob("vectors/*/Late/*.npy")
    vectors_nd = np.zeros_like(np.load(piece))
    np.save(piece, vectors_nd)
    texts = ["not what these vectors are of"] * len(vectors_nd)
    np.testing.assert_array_equal(_Encoder(str(folder), "torch").embed(texts, piece), vectors_nd)


def test_a_published_table_of_instructions_is_mtebs_own(folder: Path) -> None:
    table = prompts_of("f2llm-v2")
    name = next(iter(table))
    model, engine = MtebEncoder(folder, prompts=table), Engine(folder)
    known = mteb.get_task(name).metadata
    vectors = model.encode([{"text": LINES}], task_metadata=known, prompt_type=None)
    np.testing.assert_allclose(vectors, engine.embed(LINES, prompt=f"Instruct: {table[name]}\nQuery: "), atol=1e-6)
    documents = model.encode([{"text": LINES}], task_metadata=known, prompt_type=PromptType.document)
    np.testing.assert_allclose(documents, engine.embed(LINES), atol=1e-6)


def test_meta_counts_parameters(folder: Path) -> None:
    from f2llm_ray.model.checkpoint import load_backbone

    meta = model_meta(folder)
    assert meta.n_parameters == sum(weight.numel() for weight in load_backbone(folder).parameters())
    assert meta.embed_dim == [8, 16, 32]


def test_meta_has_what_the_card_says(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    assert model_meta(copy).languages is None
    facts = {"language": ["de", "xx-no-such", "sco"], "license": "other", "base_model": "Qwen/Qwen3-0.6B"}
    (copy / "README.md").write_text(f"---\n{yaml.safe_dump(facts)}---\n# tiny\n")
    meta = model_meta(copy)
    assert (meta.languages, meta.license, meta.adapted_from) == (["deu-Latn", "sco-Latn"], None, "Qwen/Qwen3-0.6B")
    (copy / "README.md").write_text(f"---\n{yaml.safe_dump(facts | {'license': 'apache-2.0'})}---\n# tiny\n")
    assert model_meta(copy).license == "apache-2.0"
    (copy / "README.md").write_text("---\n: [\n---\n")
    with pytest.raises(RunError, match="front matter is not YAML"):
        model_meta(copy)


def test_unknown_names_get_one_line() -> None:
    with pytest.raises(RunError, match="NoSuchTask"):
        find_tasks([], ["NoSuchTask"], [])
    with pytest.raises(RunError, match="NoSuchBenchmark"):
        find_tasks(["NoSuchBenchmark"], [], [])
    with pytest.raises(RunError, match=r"none of \['STS12'\] has one of the languages \['deu'\]"):
        find_tasks([], ["STS12"], ["deu"])


def test_benchmarks_are_cut_by_language_and_by_name() -> None:
    names = [task.metadata.name for task in find_tasks(["MTEB(Multilingual, v2)"], ["STS22.v2", "STS17"], ["deu"])]
    assert sorted(names) == ["STS17", "STS22.v2"]


def test_a_benchmarks_own_subsets_and_splits_are_kept() -> None:
    def cut(benchmarks: list[str], languages: list[str]) -> dict[str, tuple[list[str], list[str]]]:
        tasks = find_tasks(benchmarks, ["STS17", "MassiveIntentClassification"], languages)
        return {task.metadata.name: (list(task.hf_subsets), list(task.eval_splits)) for task in tasks}

    english = cut(["MTEB(eng, v2)"], [])
    assert english == {"STS17": (["en-en"], ["test"]), "MassiveIntentClassification": (["en"], ["test"])}
    assert cut(["MTEB(eng, v2)"], ["eng"]) == english
    with pytest.raises(RunError, match=r"has one of the languages \['deu'\]"):
        cut(["MTEB(eng, v2)"], ["deu"])
    both = cut(["MTEB(eng, v2)", "MTEB(Multilingual, v2)"], ["deu"])
    assert both["STS17"] == (["en-de"], ["test"])
    assert cut(["MTEB(eng, v2)"], []) == english, "what others asked for does not stay"


def test_a_model_that_is_none_and_a_place_that_is_no_disk_are_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a model folder"):
        run_mteb(str(tmp_path / "no"), [MockSTSTask()], str(tmp_path))
    with pytest.raises(RunError, match=r"memory://results is not on a disk"):
        run_mteb(str(tmp_path), [MockSTSTask()], "memory://results")
