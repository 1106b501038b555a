"""The loader alone: how fast it feeds two ranks, and how their memory grows with the corpus.

A made-up prepared corpus is written with the project's own writers; two consumers take its batches and do nothing
else. `--scale` runs 100,000 and 1,000,000 rows at the same number of steps, each in a Ray session of its own, and
compares what a consumer holds for itself at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from f2llm_ray.base.session import connect
from f2llm_ray.data.batches.build import build_batches
from f2llm_ray.data.batches.table import BatchTable
from f2llm_ray.data.keys import shard_of
from f2llm_ray.data.ragged import list_array
from f2llm_ray.data.schema import KEY, KEY_BYTES, SourceFacts, Task, key_numbers
from f2llm_ray.data.tokens import store as tokens
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.loader import stream
from f2llm_ray.train.settings import TrainStage
from f2llm_ray.train.training import batch_plan

SCALE = (100_000, 1_000_000)
WORLD = 2
WARM_STEPS = 50
"""Steps that each consumer takes before the clock starts, in which Ray Data starts its workers."""
PREFETCH = 4
PIECES, SHARDS = 8, 16
TEXTS_PER_WRITE = 16_384
# Share of the rows, and negatives per row: as many as a stage draws.
SOURCES: dict[str, tuple[float, Task, int]] = {
    "questions": (0.6, "retrieval", 7),
    "clusters": (0.2, "clustering", 9),
    "topics": (0.2, "classification", 1),
}
LABELS = 50


def write_corpus(prepared: Folder, rows: int, seed: int) -> int:
    """Writes the tables and the token store of a prepared corpus of random ids, and returns its tokens."""
    generator = np.random.default_rng(seed)
    texts = []
    for name, (share, task, negatives) in SOURCES.items():
        number = round(rows * share)
        queries = random_keys(generator, number)
        passages = random_keys(generator, LABELS if task == "classification" else number)
        own = np.arange(number) if len(passages) == number else generator.integers(0, len(passages), number)
        others = passages.take(pa.array(generator.integers(0, len(passages), number * negatives)))
        texts += [queries, passages]
        columns = {
            "query_key": queries,
            "passage_key": passages.take(pa.array(own)),
            "negative_keys": list_array(others, np.full(number, negatives)),
            "query_group": queries,
            "passage_group": passages.take(pa.array(own)),
            "language": pa.array(["eng"] * number),
            "validation": pa.array(generator.random(number) < 0.01),
        }
        table = pa.table(columns)
        (prepared / "table").write_table(f"{name}.parquet", [table], table.schema)
    with (prepared / "tokens").writing() as folder:
        return write_store(folder, pa.concat_arrays(texts), generator)


def random_keys(generator: np.random.Generator, number: int) -> pa.Array:
    """Ids as random as hashes are."""
    data = pa.py_buffer(generator.bytes(number * KEY_BYTES))
    return pa.Array.from_buffers(KEY, number, [None, data])


def write_store(folder: Path, keys: pa.Array, generator: np.random.Generator) -> int:
    """A token store of random tokens with lognormal lengths (median 20), and its number of tokens."""
    lengths = np.clip(generator.lognormal(3.0, 0.8, len(keys)), 2, 1024).astype(np.int64)
    entries = []
    for piece, some in enumerate(np.array_split(np.arange(len(keys)), PIECES)):
        written = tokens.write_piece(folder / f"{piece:06d}.bin", random_texts(lengths[some], generator))
        written = written.append_column("key", keys.slice(some[0], len(some)))
        entries.append(written.append_column("piece", pa.array(np.full(len(some), piece))))
    table = pa.concat_tables(entries)
    shard = shard_of(key_numbers(table["key"]), SHARDS)
    for number in range(SHARDS):
        tokens.write_index(folder, number, table.filter(pa.array(shard == number)))
    tokens.write_meta(folder, shards=SHARDS, texts=len(keys), tokens=int(lengths.sum()))
    return int(lengths.sum())


def random_texts(lengths: np.ndarray, generator: np.random.Generator) -> Iterator[list[np.ndarray]]:
    """Random token ids of each text, some texts at a time."""
    for start in range(0, len(lengths), TEXTS_PER_WRITE):
        some = lengths[start : start + TEXTS_PER_WRITE]
        ids = generator.integers(0, 100_000, some.sum(), dtype=np.uint32)
        yield np.split(ids, np.cumsum(some)[:-1])


class Consumer:
    """One rank that takes batches and drops them."""

    def start(self, table: BatchTable, store: Path, rank: int) -> None:
        """Takes the first steps."""
        self.batches = stream(table, store, first_step=0, rank=rank, world=WORLD, prefetch=PREFETCH)
        self.take(WARM_STEPS)

    def take(self, steps: int) -> dict[str, float]:
        """Takes more steps; their tokens and seconds, and the MB that this process holds for itself at the end."""
        started, taken = time.perf_counter(), 0
        for _ in range(steps):
            taken += sum(len(text) for text in next(self.batches).tokens)
        return {"tokens": taken, "seconds": time.perf_counter() - started, "mb": memory_mb("self", "Private_")}


def memory_mb(process: int | str, kind: str) -> float:
    """MB of a process's memory of one kind, as Linux counts it.

    Args:
        process: its id.
        kind: how the lines to be summed begin: "Private_" for what no other process maps, "Anonymous" for what is
            not mapped from a file.
    """
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1e3


def loaders() -> list[int]:
    """Processes of this Ray session that prepare batches: Ray's workers, but for the consumers and idle ones."""
    parent, title = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                title[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:  # ended meanwhile
                continue

    def ours(process: int) -> bool:
        while process in parent and process != os.getpid():
            process = parent[process]
        return process == os.getpid()

    working = [p for p, name in title.items() if name.startswith("ray::") and "Consumer" not in name]
    return [process for process in working if ours(process) and not title[process].startswith("ray::IDLE")]


def measure(rows: int, steps: int, global_batch: int) -> dict[str, Any]:
    """Builds a corpus and streams its batches to two consumers."""
    import ray

    plan = batch_plan(TrainStage(global_batch=global_batch, instructions=False))
    sources = {name: SourceFacts(task, "") for name, (_, task, _) in SOURCES.items()}
    with tempfile.TemporaryDirectory() as root:
        prepared, out = Folder.at(root) / "prepared", Folder.at(root) / "batches"
        started = time.perf_counter()
        corpus_tokens = write_corpus(prepared, rows, seed=0)
        corpus_s = time.perf_counter() - started
        connect()
        started = time.perf_counter()
        build_batches(plan, sources, "0/bench", prepared=prepared, mined=None, out=out)
        batches_s = time.perf_counter() - started
        # Consumers must not be processes that have held the tables of the build.
        ray.shutdown()
        connect()
        table, store = BatchTable(Path(out.path) / "train", tuple(SOURCES)), Path(prepared.path) / "tokens"
        actor = ray.remote(num_cpus=0)(Consumer)
        consumers = [actor.remote() for _ in range(WORLD)]
        ray.get([consumer.start.remote(table, store, rank) for rank, consumer in enumerate(consumers)])
        taken = ray.get([consumer.take.remote(steps - WARM_STEPS) for consumer in consumers])
        loading = sum(memory_mb(process, "Anonymous") for process in loaders())
        available = len(table.order())
        ray.shutdown()
    seconds = max(consumer["seconds"] for consumer in taken)
    return {
        "rows": rows,
        "corpus_tokens": corpus_tokens,
        "batches": available,
        "steps": steps,
        "corpus_s": round(corpus_s, 1),
        "build_batches_s": round(batches_s, 1),
        "batches_per_s": round((steps - WARM_STEPS) / seconds, 1),
        "tokens_per_s": round(sum(consumer["tokens"] for consumer in taken) / seconds),
        "consumer_mb": round(max(consumer["mb"] for consumer in taken), 1),
        "loaders_mb": round(loading, 1),
    }


def main() -> None:
    """Runs one size, or both of `SCALE`, and prints one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=SCALE[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--global-batch", type=int, default=128)
    parser.add_argument("--scale", action="store_true", help="100k and 1M rows, whatever --rows says")
    arguments = parser.parse_args()
    sizes = SCALE if arguments.scale else (arguments.rows,)
    most = sizes[0] * 95 // 100 // arguments.global_batch  # 1 % are held out, and batches must not run short
    if not WARM_STEPS < arguments.steps <= most:
        parser.error(f"--steps: {arguments.steps} is not more than {WARM_STEPS} and at most {most}")

    runs = []
    for rows in sizes:
        runs.append(measure(rows, arguments.steps, arguments.global_batch))
        print(json.dumps(runs[-1]))
    small, large = runs[0], runs[-1]
    growth = {
        name: round(large[key] - small[key], 1) if arguments.scale else None
        for name, key in (
            ("rss_growth_mb_100k_to_1m", "consumer_mb"),
            ("loaders_growth_mb_100k_to_1m", "loaders_mb"),
        )
    }
    print(json.dumps({**large, "consumers": WORLD, "global_batch": arguments.global_batch, **growth}))


if __name__ == "__main__":
    main()
