"""The kinds of tasks: a new one is a file like the others here, and its class in `LABELLED`."""

from __future__ import annotations

from f2llm_ray.base.errors import DataError
from f2llm_ray.evaluate.metrics.weighted_metrics import Builder
from f2llm_ray.evaluate.tasks.bitext import Bitext
from f2llm_ray.evaluate.tasks.classification import Classification
from f2llm_ray.evaluate.tasks.clustering import Clustering
from f2llm_ray.evaluate.tasks.labelled import LabelledFile, LabelledSet
from f2llm_ray.evaluate.tasks.reranking import Reranking
from f2llm_ray.evaluate.tasks.retrieval_set import FolderSet, RetrievalSet, read_beir
from f2llm_ray.evaluate.tasks.task import Task
from f2llm_ray.evaluate.tasks.text_pairs import PairClassification, Sts
from f2llm_ray.run.folder import Folder

LABELLED: dict[str, type[LabelledSet]] = {
    task.kind: task for task in (Bitext, Classification, Clustering, Sts, PairClassification, Reranking)
}
"""Kinds whose sets are tables of texts with labels."""

TASKS: dict[str, type[Task]] = {RetrievalSet.kind: RetrievalSet, **LABELLED}


def main_metric(kind: str) -> Builder:
    """How the main metric of a kind is computed from its units."""
    return next(iter(TASKS[kind].metrics.values()))


def task_of(name: str, setting: FolderSet | LabelledFile) -> Task:
    """Reads a user's set, by its entry in the recipe.

    Raises:
        RunError: a URI cannot be opened.
        DataError: a file, column or row that is not as the kind needs it.
    """
    if isinstance(setting, FolderSet):
        most = setting.max_queries
        return read_beir(setting.folder, name=name, instruction=setting.instruction, max_queries=most)
    return LABELLED[setting.kind].of_files(files_of(setting), name, setting.instruction)


def files_of(setting: LabelledFile) -> dict[str, str]:
    """The files of a labelled set by table, those that the recipe names."""
    tables = LABELLED[setting.kind].columns
    return {table: getattr(setting, table) for table in tables if table in type(setting).model_fields}


def read_task(folder: Folder) -> Task:
    """Reads what `Task.write` wrote.

    Raises:
        RunError: set.json is not there.
        DataError: a file is missing or does not hold a task, or the kind is not known.
    """
    kind = folder.read_json("set.json")["kind"]
    if kind not in TASKS:
        raise DataError(f"{folder.uri}/set.json: found kind {kind!r}, expected {' or '.join(TASKS)}")
    return TASKS[kind].read(folder)
