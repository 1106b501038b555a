"""Training rows that hold a text of a task of mteb are removed, counted by task, and said in the model's card."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from mteb.mocks.mock_tasks.bitext_mining import MockBitextMiningTask, MockMultilingualParallelBitextMiningTask
from mteb.mocks.mock_tasks.classification import MockClassificationTask
from mteb.mocks.mock_tasks.clustering import MockClusteringTask, MockMultilingualClusteringFastTask
from mteb.mocks.mock_tasks.pair_classification import MockPairClassificationTask
from mteb.mocks.mock_tasks.reranking import MockAggregatedTask, MockRerankingTask
from mteb.mocks.mock_tasks.retrieval import (
    MockMultilingualRetrievalTask,
    MockRetrievalDialogTask,
    MockRetrievalTask,
)
from mteb.mocks.mock_tasks.sts import MockMultilingualSTSTask, MockSTSTask, MockVisualSTSTask
from mteb.mocks.mock_tasks.summarization import MockSummarizationTask

from f2llm_ray.base.errors import RecipeError, RunError
from f2llm_ray.evaluate.mteb_texts import task_of, texts_of, version_of
from f2llm_ray.pipeline.declare import declare
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.recipe.files import parse
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.report.model_card import model_card
from f2llm_ray.run.root import Run
from tests.corpus import write_corpus

ASKED = "wie ändert man das Kennwort eines Kontos"
ANSWER = "open the settings of your account choose security and type the new password twice"
HALF = ["eins zwei drei vier", "une deux trois quatre"]


class LocalRetrieval(MockRetrievalTask):
    """A task with data of its own: one query, one passage."""

    metadata = MockRetrievalTask.metadata.model_copy(update={"name": "LocalRetrieval"})

    def load_data(self, *_: Any, **__: Any) -> None:
        self.dataset = {
            "default": {
                "test": {
                    "queries": Dataset.from_list([{"id": "q", "text": ASKED}]),
                    "corpus": Dataset.from_list([{"id": "d", "title": "Help", "text": ANSWER}]),
                    "relevant_docs": {"q": {"d": 1}},
                    "top_ranked": None,
                }
            }
        }
        self.data_loaded = True


class LocalPairs(MockSTSTask):
    """A task of pairs of short texts; what it has to train on does not count."""

    metadata = MockSTSTask.metadata.model_copy(update={"name": "LocalPairs"})

    def load_data(self, *_: Any, **__: Any) -> None:
        test = Dataset.from_dict({"sentence1": HALF[:1], "sentence2": HALF[1:], "score": [1.0]})
        train = Dataset.from_dict({"sentence1": ["plain row"], "sentence2": ["plain row"], "score": [1.0]})
        self.dataset = DatasetDict({"test": test, "train": train})
        self.data_loaded = True


class Gone(MockSTSTask):
    """A task whose data cannot be had."""

    metadata = MockSTSTask.metadata.model_copy(update={"name": "Gone"})

    def load_data(self, *_: Any, **__: Any) -> None:
        raise ConnectionError("no route to\nthe hub")


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = vars(sys.modules["mteb.get_tasks"])["_TASKS_REGISTRY"]
    for task in (LocalRetrieval, LocalPairs, Gone, MockVisualSTSTask):
        monkeypatch.setitem(registry, task.metadata.name, task)


def test_each_kind_gives_the_texts_that_are_evaluated() -> None:
    short = "This is a test sentence"
    asked, answers = texts_of(MockRetrievalTask())
    assert asked == [short, "This is another test sentence"]
    assert sorted(answers) == [
        "Title of d1 This is a positive sentence",
        "Title of d2 This is another positive sentence",
    ]
    for task in (MockMultilingualRetrievalTask(), MockRerankingTask(), MockAggregatedTask()):
        found = texts_of(task)
        assert (short in found.asked, bool(found.answers)) == (True, True)
    assert len(texts_of(MockRetrievalDialogTask()).asked) >= 2, "each turn is a text"
    for task in (
        MockSTSTask(), MockMultilingualSTSTask(), MockClassificationTask(), MockPairClassificationTask(),
        MockBitextMiningTask(), MockMultilingualParallelBitextMiningTask(), MockClusteringTask(),
        MockMultilingualClusteringFastTask(), MockSummarizationTask(),
    ):  # fmt: skip
        found = texts_of(task)
        assert found.answers == []
        assert len(found.asked) >= 2, task.metadata.name
        assert all(" " in text for text in found.asked), "labels are no texts"
    assert "This is another train sentence" not in texts_of(MockClassificationTask()).asked
    assert "dette er en test sætning" in texts_of(MockSTSTask()).asked


@pytest.mark.usefixtures("known")
def test_the_version_is_that_of_the_data() -> None:
    assert version_of(task_of("STS17")) == version_of(task_of("STS17")) != version_of(task_of("STS22.v2"))
    assert version_of(task_of("CQADupstackRetrieval"))  # a task of tasks


@pytest.mark.usefixtures("known")
def test_what_cannot_be_loaded_is_one_line_that_names_the_task() -> None:
    with pytest.raises(
        RunError, match=r"^data.decontaminate.mteb: Gone: its data cannot be had.*no route to the hub$"
    ):
        texts_of(Gone())
    with pytest.raises(RecipeError, match=r"'ArguAnna' is not a task of mteb .*; did you mean ArguAna"):
        task_of("ArguAnna")
    with pytest.raises(RecipeError, match=r"MockVisualSTS.* has no texts, but image; leave it out"):
        task_of(MockVisualSTSTask.metadata.name)


def recipe_of(folder: Path, *tasks: str) -> Recipe:
    given = write_corpus(folder, rows=120)
    lines = [
        {"q": ASKED, "p": "planted beside a query", "lang": "deu"},
        {"q": "planted with a passage", "p": f"You must {ANSWER}.", "lang": "deu"},
        {"q": "planted with the other of a pair", "p": HALF[1], "lang": "fra"},
        {"q": "plain row", "p": "stays", "lang": "deu"},
    ]
    with (folder / "pairs.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    given.setdefault("data", {})["decontaminate"] = {"mteb": list(tasks)}
    return parse(Recipe, given, "r")


@pytest.mark.usefixtures("known", "ray_here")
def test_rows_with_a_text_of_a_task_are_left_out_and_counted_by_task(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"data.decontaminate.mteb: Gone: its data cannot be had"):
        Pipeline(recipe_of(tmp_path, "LocalRetrieval", "Gone"), str(tmp_path / "root")).job("prepare")
    assert not list((tmp_path / "root").glob("prepare-*/manifest.json")), "nothing is prepared without it"
    recipe = recipe_of(tmp_path, "LocalRetrieval", "LocalPairs")
    pipeline = Pipeline(recipe, str(tmp_path / "root"))
    pipeline.job("prepare")
    (prepared,) = (tmp_path / "root").glob("prepare-*/manifest.json")
    card = json.loads((prepared.parent / "card.json").read_text())
    contamination = {name: rows for name, rows in card["contamination"].items() if name.startswith("mteb:")}
    assert contamination == {"mteb:LocalRetrieval": {"pairs": 2}, "mteb:LocalPairs": {"pairs": 1}}
    rows = pa.concat_tables(
        pa.parquet.read_table(file, columns=["query", "drop"])
        for file in (prepared.parent / "rows").glob("*.parquet")
    ).to_pylist()
    assert {row["drop"] for row in rows if row["query"] == ASKED} == {"decontaminate: mteb:LocalRetrieval"}
    assert {row["drop"] for row in rows if row["query"] == "plain row"} == {None}

    report = pipeline.report()
    assert report["decontaminated"] == ["LocalRetrieval", "LocalPairs"]
    # The same tasks: nothing runs again. One more, or none: the data are prepared again.
    run = Run(str(tmp_path / "root"))
    assert run.manifest(declare(recipe, run).prepare) is not None
    for tasks in ((), ("LocalRetrieval",)):
        other = recipe.model_copy(update={"data": recipe.data.model_copy(update={
            "decontaminate": recipe.data.decontaminate.model_copy(update={"mteb": tasks})
        })})  # fmt: skip
        assert run.manifest(declare(other, run).prepare) is None


@pytest.mark.usefixtures("known")
def test_an_unknown_task_is_refused_before_any_work(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "STS1777")
    with pytest.raises(RecipeError, match=r"data.decontaminate.mteb: 'STS1777' is not a task of mteb"):
        declare(recipe, Run(str(tmp_path / "root")))
    assert not (tmp_path / "root").exists()


def test_the_model_card_names_the_tasks() -> None:
    from f2llm_ray.model.checkpoint import ModelInfo

    info = ModelInfo(name="m", dims=(8,), max_tokens=8, prompts={}, instructions=False)
    source = {"task": "retrieval", "rows": 3, "licence": "MIT", "instruction": ""}
    model = {"name": "m", "parameters": 8, "non_embedding_parameters": 8, "sources": ["s"], "scores": {}}
    report = {"name": "r", "created": "today", "models": [model], "sources": {"s": source}}
    line = "Rows that hold a text of these tasks of mteb were left out: STS17, ArguAna."
    assert line in model_card({**report, "decontaminated": ["STS17", "ArguAna"]}, model, info)
    assert "tasks of mteb" not in model_card(report, model, info)
