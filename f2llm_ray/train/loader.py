"""The loader: Ray Data streams a batch table from any step on, looks up tokens and collates ahead of training.

Shapes: B global batch, b rows of one rank, n distinct texts among them, k most negatives of a row.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.data.batches.table import BatchTable, rank_slice
from f2llm_ray.data.ragged import Ints
from f2llm_ray.data.schema import key_numbers
from f2llm_ray.data.tokens.store import Tokens, TokenStore
from f2llm_ray.engine.vector_files import Halves
from f2llm_ray.train.teacher_store import TeacherStore

# Steps that one loading task prepares, each handed on as it is ready. Ray Data's rounds set the rate: tasks of 4
# steps gave two consumers on 2 cores 15 to 17 batches/s, tasks of 16 gave 43 to 50 (benchmarks/loader.py).
STEPS_PER_TASK = 16
Scores = np.ndarray[Any, np.dtype[np.float32]]
PAUSE = 0.1
"""Seconds between two rounds of Ray Data's executor, each of which can hand on the steps of a whole task."""


@dataclass(frozen=True)
class TrainBatch:
    """One rank's part of a global batch. A text that occurs several times is listed, and encoded, once."""

    step: int
    source: str
    tokens: list[Tokens]
    """Token ids of each distinct text [n]."""
    query: Ints
    """Place of each row's query among the texts [b]."""
    passage: Ints
    """Place of each row's passage [b]."""
    negative: Ints
    """Places of each row's negatives [b, k], -1 where it has fewer."""
    passage_id: Ints
    """An id of each passage's content [b]: equal passages are no negatives of each other."""
    query_id: Ints
    """The same of each query [b]: a passage that reads like a query is no negative of it."""
    scores: Scores | None = None
    """A teacher's, of each row's passage and negatives [b, 1 + k]; NaN where it says nothing, None where the
    source brings no scores."""
    teacher: Halves | None = None
    """The teacher's vectors of the texts [n, D], where they were computed before."""


def stream(
    table: BatchTable,
    store: Path,
    *,
    first_step: int,
    rank: int,
    world: int,
    prefetch: int,
    taught: Path | None = None,
) -> Iterator[TrainBatch]:
    """One rank's part of every global batch from `first_step` on, prepared ahead by Ray Data from this call on.

    Ray Data's executor runs in an actor beside the trainer: inside it, its threads take the interpreter from the
    training step (2 cores, ray 2.60, quickstart's stage 1: 8,800 tokens/s inside, 16,000 without).

    Args:
        table: the batch table.
        store: folder of the token store.
        first_step: where to start, 0 for the beginning.
        rank: this worker.
        world: number of workers.
        prefetch: batches on their way to the trainer.
        taught: folder of the teacher's vectors, which then come with the batches.
    """
    import ray

    steps = len(table.order())
    if first_step >= steps:
        return iter(())
    row_of = partial(_collate, table, store, taught, rank, world)
    # No core is booked: looking up is memory-mapped reading, and must not wait for those that trainers hold.
    feeder = ray.remote(num_cpus=0)(_Feeder).remote(row_of, range(first_step, steps))
    coming = deque(feeder.next.remote() for _ in range(min(prefetch, steps - first_step)))

    def batches() -> Iterator[TrainBatch]:
        for step in range(first_step, steps):
            row = ray.get(coming.popleft())
            if step + prefetch < steps:
                coming.append(feeder.next.remote())
            yield _unpack(row, table.sources)

    return batches()


def read(
    table: BatchTable, store: Path, *, rank: int, world: int, taught: Path | None = None
) -> Iterator[TrainBatch]:
    """One rank's part of every batch, read as it is asked for: for the few batches of a validation."""
    for step in range(len(table.order())):
        yield _unpack(_collate(table, store, taught, rank, world, step), table.sources)


class _Feeder:
    """The actor that runs Ray Data for one rank."""

    def __init__(self, row_of: Callable[[int], pa.Table], steps: range) -> None:
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        context.custom_execution_callback_classes = [_pausing()]

        def load(firsts: pa.Table) -> Iterator[pa.Table]:
            for first in firsts["item"].to_pylist():
                yield from map(row_of, range(first, min(first + STEPS_PER_TASK, steps.stop)))

        # Not ray.data.range or from_arrow: their tasks book a core each, and trainers may hold all.
        firsts = list(steps[::STEPS_PER_TASK])
        dataset = ray.data.from_items(firsts, override_num_blocks=len(firsts)).map_batches(
            load,
            batch_format="pyarrow",
            num_cpus=0,
            # One process per rank keeps well ahead; more of them start up (seconds each) just to wait.
            concurrency=1,
        )
        self.rows = iter(dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=1))

    def next(self) -> pa.Table:
        """The next step's row."""
        return next(self.rows)


def _pausing() -> type:
    """A callback that makes Ray Data's executor pause between rounds.

    While its output is full it loops without a pause, and takes a core from the trainers (ray 2.60).
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pausing(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            del executor
            time.sleep(PAUSE)

    return Pausing


_store = lru_cache(maxsize=4)(TokenStore)
_vectors = lru_cache(maxsize=4)(TeacherStore)
_order = lru_cache(maxsize=4)(BatchTable.order)


def _collate(table: BatchTable, store: Path, taught: Path | None, rank: int, world: int, step: int) -> pa.Table:
    """One rank's part of a step as one row of flat lists: tokens, places and the teacher's vectors."""
    entry = _order(table)[step]
    batch = table.batch(entry)
    rows = rank_slice(len(batch), rank, world)
    batch = batch.slice(rows.start, rows.stop - rows.start)
    negatives = batch["negatives"]
    keys = np.concatenate(
        [key_numbers(batch["query"]), key_numbers(batch["passage"]), key_numbers(pc.list_flatten(negatives))]
    )
    _, first, place = np.unique(keys.view("V16"), return_index=True, return_inverse=True)
    tokens = _store(store).lookup(keys[first])
    columns: dict[str, Any] = {
        "tokens": np.concatenate(tokens),
        "lengths": np.array([len(text) for text in tokens], dtype=np.int32),
        "places": place.reshape(-1).astype(np.int32),
        "negatives": pc.list_value_length(negatives).to_numpy().astype(np.int32),
        "passage_id": key_numbers(batch["passage"])[:, 1].astype(np.int64),
        "query_id": key_numbers(batch["query"])[:, 1].astype(np.int64),
    }
    if "passage_score" in batch.schema.names:
        scores = [batch["passage_score"], pc.list_flatten(batch["negative_scores"])]
        columns["scores"] = np.concatenate([part.to_numpy(zero_copy_only=False) for part in scores])
    if taught is not None:
        columns["teacher"] = _vectors(taught).lookup(keys[first]).reshape(-1)
    lists = {
        name: pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), pa.array(values))
        for name, values in columns.items()
    }
    return pa.table({"step": [step], "source": [int(entry["source"])], **lists})


def _unpack(row: pa.Table, sources: tuple[str, ...]) -> TrainBatch:
    values = {name: row[name].combine_chunks().values.to_numpy() for name in row.column_names[2:]}
    tokens = np.split(values["tokens"], np.cumsum(values["lengths"])[:-1])
    counts = values["negatives"]
    rows, places = len(counts), values["places"].astype(np.int64)
    negative = np.full((rows, int(counts.max(initial=0))), -1, dtype=np.int64)
    there = np.arange(negative.shape[1]) < counts[:, None]
    negative[there] = places[2 * rows :]
    scores = None
    if "scores" in values:
        scores = np.full((rows, 1 + negative.shape[1]), np.nan, dtype=np.float32)
        scores[:, 0] = values["scores"][:rows]
        scores[:, 1:][there] = values["scores"][rows:]
    return TrainBatch(
        step=row["step"][0].as_py(),
        source=sources[row["source"][0].as_py()],
        tokens=tokens,
        query=places[:rows],
        passage=places[rows : 2 * rows],
        negative=negative,
        passage_id=values["passage_id"].astype(np.int64),
        query_id=values["query_id"].astype(np.int64),
        scores=scores,
        teacher=values["teacher"].reshape(len(tokens), -1) if "teacher" in values else None,
    )
