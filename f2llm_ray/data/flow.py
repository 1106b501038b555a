"""How data steps use Ray Data: parts of sources as tasks, and groups by a key."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from f2llm_ray.base.errors import DataError, F2LLMError, RunError
from f2llm_ray.base.progress import Progress
from f2llm_ray.data.reading.base import Piece, SourceBase

if TYPE_CHECKING:
    import ray.data

Tables = Iterator[pa.Table]
Item = dict[str, Any]
"""A task's work or its outcome, as JSON values."""
ERROR = "error"
SHOWN_ERRORS = 20
LOST = {"max_restarts": 3, "max_task_retries": 3}
"""How often an actor that is lost comes back, and takes its item again."""
THREADS = 32
"""Of one process whose work is waiting."""


@dataclass(frozen=True)
class Part:
    """What one task reads: pieces of one source that follow each other."""

    number: int
    """Its place among all parts of the run, and the name of its file."""
    source: str
    source_rank: int
    pieces: tuple[Piece, ...]
    key: str = ""
    """Hash of all that its rows depend on: contents of its files, and settings. What was written in the root under
    this key is not read again."""

    @property
    def file(self) -> str:
        """Name of the file that its rows are written to."""
        return part_file(self.number)


def part_file(number: int) -> str:
    """Name of the file with the rows of a part."""
    return f"{number:06d}.parquet"


def parts_of(
    sources: Mapping[str, SourceBase], key: Callable[[str, tuple[Piece, ...]], str] = lambda _, __: ""
) -> list[Part]:
    """The parts of all sources, in the recipe's order, with keys by the name of the source and its pieces."""
    found: list[Part] = []
    for rank, (name, source) in enumerate(sources.items()):
        pieces, size = source.pieces(name), source.pieces_per_part
        for first in range(0, len(pieces), size):
            some = tuple(pieces[first : first + size])
            found.append(Part(len(found), name, rank, some, key(name, some)))
    return found


def map_parts(parts: list[Part], function: Callable[[Part], Tables]) -> ray.data.Dataset:
    """Runs a function on every part, each in a task of its own.

    What the function finds wrong with the data arrives as a row with only an `error`, since Ray Data passes on the
    text of a task's exception but not the exception; `checked` raises it again.
    """
    import ray.data

    blocks = [pa.Table.from_pylist([{**vars(part), "pieces": json.dumps(part.pieces)}]) for part in parts]
    dataset = ray.data.from_arrow(blocks)
    return dataset.map_batches(partial(_on_part, function=function), batch_size=1, batch_format="pyarrow")


def _on_part(batch: pa.Table, *, function: Callable[[Part], Tables]) -> Tables:
    (row,) = batch.to_pylist()
    try:
        yield from function(Part(**{**row, "pieces": tuple(json.loads(row["pieces"]))}))
    except DataError as error:
        yield pa.table({ERROR: [str(error)]})


def checked(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The tables of `map_parts` that hold rows.

    Raises:
        DataError: the first one that a task met.
    """
    for table in tables:
        if ERROR in table.column_names:
            for message in table[ERROR].to_pylist():
                if message is not None:
                    raise DataError(message)
        elif table.num_columns:  # a part may give no row, and then no columns
            yield table


def map_groups(
    dataset: ray.data.Dataset, column: str, function: Callable[[pa.Table], pa.Table]
) -> ray.data.Dataset:
    """Brings rows with equal values of a column together and runs a function on each group."""
    return dataset.groupby(column).map_groups(function, batch_format="pyarrow")


def each(
    label: str, items: list[Item], work: Callable[[Item], Item], *, num_cpus: float = 1, num_gpus: float = 0
) -> Iterator[Item]:
    """Runs a function on every item, each in a task of its own, and gives what they return as it comes.

    Plain tasks, which the dashboard lists under the label: nothing flows between them, and through Ray Data
    near-duplicates among a million texts took 1.39 times as long (docs/decisions.md).

    Raises:
        RunError: what the tasks found wrong, all of it.
    """
    import ray

    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(guarded).options(name=label)
    shared = ray.put(work)
    yield from outcomes(label, items, _as_they_come([task.remote(item, shared) for item in items]))


def _as_they_come(pending: list[Any]) -> Iterator[Item]:
    import ray

    while pending:
        (done,), pending = ray.wait(pending)
        yield ray.get(done)


def start_actors(
    make: Callable[[], Callable[[Item], Item]], count: int, *, num_cpus: float = 1, num_gpus: float = 0
) -> list[Any]:
    """Starts actors around a function that is costly to make, such as one that holds a model, and does not wait.

    Lost with its node, an actor comes back and takes its item again.
    """
    import ray

    worker = ray.remote(_Actor).options(num_cpus=num_cpus, num_gpus=num_gpus, **LOST)
    return [worker.remote(make) for _ in range(count)]


def start_waiting(make: Callable[[], Callable[[Item], Item]], count: int) -> list[Any]:
    """As `start_actors`, for work that waits for something else, such as an endpoint: threads of few processes.

    Several threads call the function at once. An actor is listed as often as it has threads.
    """
    import ray

    worker = ray.remote(_Actor).options(num_cpus=1, max_concurrency=THREADS, **LOST)
    actors = [worker.remote(make) for _ in range(-(-count // THREADS))]
    return (actors * count)[:count]


class _Actor:
    """Makes the function once and runs items through it; an error in making it is the outcome of every item."""

    def __init__(self, make: Callable[[], Callable[[Item], Item]]) -> None:
        try:
            self._work = make()
        except F2LLMError as error:
            self._work = partial(_refuse, error=error)

    def run(self, item: Item) -> Item:
        """One item's outcome."""
        return guarded(item, self._work)


def _refuse(item: Item, *, error: F2LLMError) -> Item:
    del item
    raise error


def each_on_actors(
    label: str, items: list[Item], actors: list[Any], *, counted: str | None = None
) -> Iterator[Item]:
    """Runs every item on whichever actor is free, and gives what came of it as it comes.

    Args:
        label: what is being done.
        items: the work.
        actors: of `start_actors`.
        counted: name of the number in items and outcomes whose sum is the progress; tasks are counted when unset.

    Raises:
        RunError: what the actors found wrong, all of it.
    """
    from ray.util import ActorPool

    results = ActorPool(actors).map_unordered(lambda actor, item: actor.run.remote(item), items)
    yield from outcomes(label, items, results, counted=counted)


def guarded(item: Item, work: Callable[[Item], Item]) -> Item:
    """What the work returns, or its error as `ERROR`, so that all errors are reported and not only the first."""
    try:
        return work(item)
    except F2LLMError as error:
        return {ERROR: str(error)}


def outcomes(
    label: str, items: list[Item], results: Iterable[Item], *, counted: str | None = None
) -> Iterator[Item]:
    """The outcomes of `guarded` as they come, with progress and rate.

    Raises:
        RunError: what the tasks found wrong, each thing once, the first of them.
    """
    total = len(items) if counted is None else sum(item[counted] for item in items)
    progress, started = Progress(label, total, counted or "tasks"), time.monotonic()
    done, errors = 0, set[str]()
    for outcome in results:
        if ERROR in outcome:
            errors.add(outcome[ERROR])
            continue
        done += 1 if counted is None else outcome[counted]
        rate = done / max(time.monotonic() - started, 1e-9)
        progress.update(done, *([] if counted is None else [f"{rate:,.0f} {counted}/s"]))
        yield outcome
    if errors:
        more = [f"and {len(errors) - SHOWN_ERRORS} more like these"] if len(errors) > SHOWN_ERRORS else []
        raise RunError("\n".join([*sorted(errors)[:SHOWN_ERRORS], *more]))
