"""The kinds of tasks: from a set's entry in the recipe to a task, and from its folder in the run back to it."""

from __future__ import annotations

from f2llm_ray.errors import DataError
from f2llm_ray.evaluate.bitext import Bitext
from f2llm_ray.evaluate.classification import Classification
from f2llm_ray.evaluate.clustering import Clustering
from f2llm_ray.evaluate.labelled import LabelledSet, read_labelled
from f2llm_ray.evaluate.reranking import Reranking
from f2llm_ray.evaluate.sets import read_beir, read_set
from f2llm_ray.evaluate.settings import ClassificationSet, FolderSet, LabelledFile
from f2llm_ray.evaluate.task import Task
from f2llm_ray.evaluate.text_pairs import PairClassification, Sts
from f2llm_ray.run import Folder

LABELLED: dict[str, type[LabelledSet]] = {
    found.kind: found for found in (Bitext, Classification, Clustering, Sts, PairClassification, Reranking)
}


def task_of(name: str, setting: FolderSet | LabelledFile) -> Task:
    """Reads a user's set.

    Args:
        name: the set's name.
        setting: its entry in the recipe.

    Raises:
        RunError: a URI cannot be opened.
        DataError: a file, column or row that is not as the kind needs it.
    """
    if isinstance(setting, FolderSet):
        return read_beir(
            setting.folder, name=name, instruction=setting.instruction, max_queries=setting.max_queries
        )
    train = setting.train if isinstance(setting, ClassificationSet) else None
    return _labelled(LABELLED[setting.kind], name, setting.instruction, setting.test, train)


def read_task(folder: Folder) -> Task:
    """Reads what `Task.write` wrote.

    Raises:
        RunError: set.json is not there.
        DataError: a file is missing or does not hold a task, or the kind is not known.
    """
    facts = folder.read_json("set.json")
    if facts["kind"] == "retrieval":
        return read_set(folder)
    if facts["kind"] not in LABELLED:
        raise DataError(
            f"{folder.uri}/set.json: found kind {facts['kind']!r}, expected retrieval or {list(LABELLED)}"
        )
    train = f"{folder.uri}/train.parquet" if folder.exists("train.parquet") else None
    return _labelled(
        LABELLED[facts["kind"]], facts["name"], facts["instruction"], f"{folder.uri}/test.parquet", train
    )


def _labelled(kind: type[LabelledSet], name: str, instruction: str, test: str, train: str | None) -> Task:
    table = read_labelled(test, kind.columns)
    if issubclass(kind, Classification):
        assert train is not None  # noqa: S101 - the recipe and `write` both have it
        return kind(
            name=name,
            instruction=instruction,
            test=table,
            place=test,
            train=read_labelled(train, kind.columns),
            train_place=train,
        )
    return kind(name=name, instruction=instruction, test=table, place=test)
