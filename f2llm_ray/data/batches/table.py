"""Global batches: the unit of training order, fixed by the seed alone.

A batch has rows of one source. Those of each source lie in `epoch-<e>/<source>.arrow`, one record batch per global
batch, ids only; `order.npy` [steps] says which of them every step takes. A worker maps the files and takes its own
slice of each batch, so the order is the same for any number of workers, from any step on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.ragged import Ints, lengths_of, list_array, numbered
from f2llm_ray.data.schema import KEY, SCORES, Task, rng

EXAMPLES = pa.schema([("query", KEY), ("passage", KEY), ("negatives", pa.list_(KEY))])
SCORED = pa.schema([*EXAMPLES, *SCORES])
"""Examples of sources that bring scores."""
ORDER = np.dtype([("epoch", "<u2"), ("source", "<u2"), ("batch", "<u4")])
# Rows put back because their texts are in the batch already are tried again for the next one; looking at more
# than this many batches' worth of them each time would make a label-like source quadratic.
LOOK_BACK = 4

# A language of a few rows is not repeated more often than this in an epoch, however high the temperature.
MOST_REPEATS = 10

Floats = np.ndarray[Any, np.dtype[np.float64]]


def row_rates(languages: Ints, weight: float, temperature: float) -> Floats:
    """How often each row [n] is taken per epoch: `weight` on average.

    A language of n rows gets a share in proportion to n^(1/temperature), at most `MOST_REPEATS` times each row.

    Args:
        languages: a number for the language of each row [n].
        weight: how often a row is taken on average.
        temperature: 1 leaves languages as they come; more evens them out.
    """
    counts = np.bincount(languages)
    shares = counts ** (1 / temperature)
    rates = weight * (shares / shares.sum()) / np.maximum(counts / len(languages), 1e-12)
    return np.asarray(np.minimum(rates, max(weight, MOST_REPEATS))[languages])


def epoch_rows(rates: Floats, generator: np.random.Generator) -> Ints:
    """Which rows an epoch takes, in its order: each floor(rate) times, a random part of equal rates once more."""
    passes = []
    left = rates.copy()
    while (left > 0).any():
        order = generator.permutation(len(left))
        taken = left[order] >= 1
        for rate in np.unique(left[(left > 0) & (left < 1)]):
            equal = np.flatnonzero(left[order] == rate)
            taken[equal[: round(rate * len(equal))]] = True
        passes.append(order[taken])
        left = np.where(left >= 1, left - 1, 0)
    return np.concatenate(passes).astype(np.int64)


def by_length(order: Ints, lengths: Ints, window: int) -> Ints:
    """The order with each stretch of `window` rows sorted by length, so that a batch has similar lengths."""
    stretches = [order[first : first + window] for first in range(0, len(order), window)]
    return np.concatenate([stretch[np.argsort(lengths[stretch], kind="stable")] for stretch in stretches])


def fill_batches(order: Ints, texts: Ints, size: int) -> list[Ints]:
    """Cuts rows into batches in which no text occurs twice.

    A row whose query or passage is already in the batch waits for the next one. What is left at the end, fewer
    than a batch or all with the same text, still goes into batches, filled up with rows of the source that were
    seen already: no row is lost, and losses mask equal passages.

    Args:
        order: row numbers in the order they are wanted.
        texts: ids [rows, k] of the texts of each row that must be unique within a batch.
        size: rows per batch.
    """
    batches: list[Ints] = []
    waiting: deque[int] = deque()
    coming = iter(order.tolist())
    left = len(order)
    while left:
        batch: list[int] = []
        seen: set[int] = set()
        back: deque[int] = deque()
        for row in _candidates(waiting, coming, LOOK_BACK * size):
            ids = texts[row].tolist()
            if seen.isdisjoint(ids):
                seen.update(ids)
                batch.append(row)
                if len(batch) == size:
                    break
            else:
                back.append(row)
        waiting.extendleft(reversed(back))
        left -= len(batch)
        while len(batch) < size and waiting:
            batch.append(waiting.popleft())
            left -= 1
        batches.append(np.array(batch, dtype=np.int64))
    if batches and len(batches[-1]) < size:
        short = batches[-1]
        filler = np.resize(order if len(batches) > 1 else short, size - len(short))
        batches[-1] = np.concatenate([short, filler])
    return batches


def _candidates(waiting: deque[int], coming: Iterator[int], limit: int) -> Iterator[int]:
    for _ in range(min(len(waiting), limit)):
        yield waiting.popleft()
    yield from islice(coming, limit)


def draw_negatives(
    lists: Sequence[pa.ListArray], count: int, generator: np.random.Generator
) -> list[pa.ListArray]:
    """Draws up to `count` items of each row's list, without repetition: the same of all lists, such as scores."""
    lengths = lengths_of(lists[0])
    rows = np.repeat(np.arange(len(lengths)), lengths)
    # A random key per negative; the first `count` of each row in that order are drawn.
    order = np.lexsort((generator.random(len(rows)), rows))
    rank = numbered(lengths)
    chosen = order[rank < count]
    return [list_array(array.flatten().take(pa.array(chosen)), np.minimum(lengths, count)) for array in lists]


def write_source(
    path: Path,
    rows: pa.Table,
    order: Ints,
    *,
    source: str,
    task: Task,
    negatives: int,
    size: int,
    seed: str,
) -> int:
    """Writes one epoch's batches of one source.

    Args:
        path: the .arrow file.
        rows: columns query, passage, negatives, query_group, passage_group (keys), in key order; with
            passage_score and negative_scores, these are written too.
        order: row numbers in the order that the epoch takes them.
        source: its name, part of the seed.
        task: retrieval batches hold no two equal or near-equal texts; elsewhere equal passages (labels) are no
            false negatives.
        negatives: negatives drawn per row.
        size: rows per global batch.
        seed: seed of the run, stage and epoch.

    Returns:
        The number of batches.
    """
    unique = _text_ids(rows) if task == "retrieval" else np.zeros((len(rows), 0), np.int64)
    batches = fill_batches(order, unique, size)
    generator = rng(seed, source, "negatives")
    rows = rows.combine_chunks()
    schema = SCORED if "passage_score" in rows.column_names else EXAMPLES
    lists = [field.name for field in schema if pa.types.is_list(field.type)]
    with pa.ipc.new_file(path, schema) as writer:
        for batch in batches:
            taken = rows.take(pa.array(batch)).combine_chunks()
            columns = {name: taken[name].combine_chunks() for name in schema.names}
            drawn = draw_negatives([columns[name] for name in lists], negatives, generator)
            columns |= dict(zip(lists, drawn, strict=True))
            arrays = [columns[field.name].cast(field.type) for field in schema]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return len(batches)


def _text_ids(rows: pa.Table) -> Ints:
    """Small numbers for the texts of each row: [rows, 2] of the groups of query and passage."""
    keys = pa.concat_arrays([*rows["query_group"].chunks, *rows["passage_group"].chunks])
    ids = keys.dictionary_encode().indices.to_numpy().astype(np.int64)
    return ids.reshape(2, -1).T


def mix(counts: Sequence[Sequence[int]], *, seed: str, max_steps: int | None = None) -> np.ndarray[Any, Any]:
    """The order of all batches: epoch after epoch, within one any batch as likely next as any other.

    That is the paper's draw of a source by its remaining number of batches.

    Args:
        counts: batches of each source in each epoch, [epochs][sources].
        seed: seed of the run and stage.
        max_steps: ends the order early.

    Returns:
        An array [steps] of `ORDER`.
    """
    epochs = []
    for epoch, of_epoch in enumerate(counts):
        entries = np.zeros(sum(of_epoch), dtype=ORDER)
        entries["epoch"] = epoch
        entries["source"] = np.repeat(np.arange(len(of_epoch)), of_epoch)
        entries["batch"] = np.concatenate([np.arange(n) for n in of_epoch])
        epochs.append(entries[rng(seed, epoch, "mix").permutation(len(entries))])
    return np.concatenate(epochs)[:max_steps]


@dataclass(frozen=True)
class BatchTable:
    """The batch table of a stage on a local disk."""

    folder: Path
    sources: tuple[str, ...]

    def order(self) -> np.ndarray[Any, Any]:
        """The batches in step order, [steps] of `ORDER`.

        Raises:
            RunError: the table is missing.
        """
        path = self.folder / "order.npy"
        if not path.is_file():
            raise RunError(f"{path}: no such file; the batch table was not finished")
        return np.load(path)

    def source(self, entry: np.ndarray[Any, Any]) -> str:
        """Name of the source of one entry of the order."""
        return self.sources[int(entry["source"])]

    def batch(self, entry: np.ndarray[Any, Any]) -> pa.RecordBatch:
        """The rows [global batch] of one entry of the order, as `EXAMPLES`."""
        path = self.folder / f"epoch-{int(entry['epoch']):03d}" / f"{self.source(entry)}.arrow"
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).get_batch(int(entry["batch"]))


def rank_slice(rows: int, rank: int, world: int) -> slice:
    """The rows of a global batch that a rank takes."""
    share = rows // world
    return slice(rank * share, (rank + 1) * share)
