"""The texts of mteb's tasks that must not be trained on, as mteb loads them: from the hub, or its cache.

A task's own splits for evaluation count, in all of its subsets; what it has to train on does not.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from f2llm_ray.base.errors import RecipeError, RunError
from f2llm_ray.base.optional import require
from f2llm_ray.data.decontaminate import Screened
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.stage import short_hash

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

KEY = "data.decontaminate.mteb"
COLUMNS = (
    "input_column_name",
    "input1_column_name",
    "input2_column_name",
    "column_names",
    "text_column_name",
    "human_summaries_column_name",
    "machine_summaries_column_name",
)
"""What mteb's kinds of tasks call the columns with their texts: one name, or several."""
PAIR = ("sentence1", "sentence2")
"""Columns of bitext mining, where its subsets are not columns of one table."""
TEXTS = pa.schema([("text", pa.string())])
PARTS = Screened._fields


def task_of(name: str) -> AbsTask:
    """A task by its name.

    Raises:
        DataError: mteb is not installed.
        RecipeError: mteb has no such task, or it has no texts.
    """
    mteb = require("mteb", extra="mteb")
    try:
        task: AbsTask = mteb.get_task(name)
    except KeyError:
        known = [task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)]
        near = difflib.get_close_matches(name, known, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise RecipeError(f"{KEY}: {name!r} is not a task of mteb {mteb.__version__}{hint}") from None
    if "text" not in task.metadata.modalities:
        found = ", ".join(task.metadata.modalities)
        raise RecipeError(f"{KEY}: {name} has no texts, but {found}; leave it out")
    return task


def version_of(task: AbsTask) -> str:
    """What tells the data of a task from any others: the data set's revision, subsets and splits."""
    said = [[part.metadata.dataset, list(part.hf_subsets), list(part.eval_splits)] for part in _parts(task)]
    return short_hash(said)


def texts_of(task: AbsTask) -> Screened:
    """Loads a task and gives its texts.

    Of retrieval and reranking the queries are asked and the corpus answers; of other kinds all texts are asked.

    Raises:
        RunError: its data cannot be had or read, or hold no text. The message names the task.
    """
    name, asked, answers = task.metadata.name, dict[str, None](), dict[str, None]()
    try:
        for part in _parts(task):
            _load(part)
            for texts, into in ((_asked(part), asked), (_answers(part), answers)):
                into.update(dict.fromkeys(text for text in texts if text.strip()))
            part.unload_data()
    except Exception as error:  # noqa: BLE001 -- of any kind: without its texts nothing may be prepared
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RunError(f"{KEY}: {name}: its data cannot be had from the hub or its cache: {why}") from None
    if not asked:
        raise RunError(f"{KEY}: {name}: its data hold no text in the splits {list(task.eval_splits)}")
    return Screened(list(asked), list(answers))


def write_texts(name: str, out: Folder) -> dict[str, int]:
    """Writes the texts of a task into its stage's folder; returns how many there are.

    Raises:
        RunError: its data cannot be had.
    """
    screened = texts_of(task_of(name))
    for part, texts in zip(PARTS, screened, strict=True):
        out.write_table(f"{part}.parquet", [pa.table([pa.array(texts, pa.string())], schema=TEXTS)], TEXTS)
    return {part: len(texts) for part, texts in zip(PARTS, screened, strict=True)}


def read_texts(folder: Folder) -> Screened:
    """What `write_texts` wrote."""
    return Screened(*(folder.read_table(f"{part}.parquet")["text"].to_pylist() for part in PARTS))


def _parts(task: AbsTask) -> Sequence[Any]:
    """The tasks that a task is put together of; itself where it is not."""
    return list(getattr(task, "tasks", None) or [task])


def _load(task: Any) -> None:
    if task.metadata.dataset.get("trust_remote_code"):
        raise RunError("they come by code of the data set, which is not run")
    task.load_data()
    if _is_retrieval(task):
        task.convert_v1_dataset_format_to_v2(num_proc=None)


def _splits(task: Any) -> Iterator[Mapping[str, Any]]:
    """The data of every subset and split that is evaluated."""
    of_subset = task.dataset
    if task.metadata.is_multilingual and not getattr(task, "parallel_subsets", False):
        subsets = [of_subset[subset] for subset in task.hf_subsets]
    else:
        subsets = list(of_subset.values()) if _is_retrieval(task) else [of_subset]
    for splits in subsets:
        yield from (splits[split] for split in task.eval_splits if split in splits)


def _is_retrieval(task: Any) -> bool:
    return hasattr(task, "convert_v1_dataset_format_to_v2")


def _asked(task: Any) -> Iterator[str]:
    if _is_retrieval(task):
        for split in _splits(task):
            yield from _strings(_column(split["queries"], "text"))
        return
    for split in _splits(task):
        for column in _columns(task):
            yield from _strings(split[column])


def _answers(task: Any) -> Iterator[str]:
    if not _is_retrieval(task):
        return
    for split in _splits(task):
        titles, texts = (_column(split["corpus"], column) for column in ("title", "text"))
        for title, text in zip(titles, texts, strict=True):
            yield f"{title or ''} {text or ''}".strip()


def _column(table: Any, name: str) -> Sequence[Any]:
    """A column; nothing in each row where there is none: what is asked may be an image, and a title may lack."""
    column: Sequence[Any] = table[name] if name in table.column_names else [None] * len(table)
    return column


def _columns(task: Any) -> list[str]:
    """The columns with texts of a task that is no retrieval."""
    if hasattr(task, "parallel_subsets"):  # bitext mining
        pairs = [pair.split("-") for pair in task.hf_subsets] if task.parallel_subsets else [PAIR]
        return sorted({column for pair in pairs for column in pair})
    found = [getattr(task, name) for name in COLUMNS if hasattr(task, name)]
    return [column for names in found for column in ([names] if isinstance(names, str) else names)]


def _strings(values: Any) -> Iterator[str]:
    """The texts in a column, whose cells may be lists, or turns of a conversation."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _strings([value.get("content")])
        elif isinstance(value, Sequence):
            yield from _strings(value)
