"""The kinds of tasks: from a set's entry in the recipe to a task, and from its folder in the run back to it."""

from __future__ import annotations

from collections.abc import Mapping

from f2llm_ray.base.errors import DataError
from f2llm_ray.evaluate.settings import ClassificationSet, FolderSet, LabelledFile
from f2llm_ray.evaluate.tasks.bitext import Bitext
from f2llm_ray.evaluate.tasks.classification import Classification
from f2llm_ray.evaluate.tasks.clustering import Clustering
from f2llm_ray.evaluate.tasks.labelled import LabelledSet, read_labelled
from f2llm_ray.evaluate.tasks.reranking import Reranking
from f2llm_ray.evaluate.tasks.retrieval_set import read_beir, read_set
from f2llm_ray.evaluate.tasks.task import Task
from f2llm_ray.evaluate.tasks.text_pairs import PairClassification, Sts
from f2llm_ray.run.folder import Folder

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
    files = {"test": setting.test}
    if isinstance(setting, ClassificationSet):
        files["train"] = setting.train
    return _labelled(setting.kind, name, setting.instruction, files)


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
    files = {file.removesuffix(".parquet"): f"{folder.uri}/{file}" for file in folder.files(".parquet")}
    return _labelled(facts["kind"], facts["name"], facts["instruction"], files)


def _labelled(kind: str, name: str, instruction: str, files: Mapping[str, str]) -> Task:
    """A labelled set of the files of its tables, each by its field of the class."""
    if kind == "classification":
        columns = Classification.columns
        test, train = (read_labelled(files[table], columns) for table in ("test", "train"))
        return Classification(
            name=name,
            instruction=instruction,
            test=test,
            place=files["test"],
            train=train,
            train_place=files["train"],
        )
    test = read_labelled(files["test"], LABELLED[kind].columns)
    if kind == "bitext" and "others" in files:
        others = read_labelled(files["others"], {"text_b": "text"})
        return Bitext(name=name, instruction=instruction, test=test, place=files["test"], others=others)
    return LABELLED[kind](name=name, instruction=instruction, test=test, place=files["test"])
