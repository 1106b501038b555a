"""Scaling: the same stage through Ray Train with several numbers of workers, each with a core and a thread."""

from __future__ import annotations

import json
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.train.setup import Place, prepare, tokens_of, training_of
from f2llm_ray.base.session import connect
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.loader import read
from f2llm_ray.train.trainer import train

WARM_UP = 3
"""Steps at the beginning that are left out: the first waits for the loader to start."""


def scaling(workers: list[int], *, rows: int, negatives: int, steps: int, rounds: int) -> dict[str, Any]:
    """Real tokens per second of each number of workers, and what each worker keeps of the rate of the fewest.

    All train on the same global batches, so that the losses agree but for the order of sums. Rates are those of
    the median step; numbers of workers take turns, and the median round counts.
    """
    import ray

    found: dict[int, list[dict[str, Any]]] = {count: [] for count in workers}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root, WARM_UP + steps, rows, negatives)
        connect()
        for number in range(rounds):
            for count in workers:
                out = root / f"{count}-workers-{number}"
                found[count].append(run(root, out, count, rows, negatives))
        ray.shutdown()
    rates = {count: statistics.median(run["tokens_per_second"] for run in runs) for count, runs in found.items()}
    first = workers[0]
    return {
        "workers": workers,
        "tokens_per_second": {str(count): round(rate) for count, rate in rates.items()},
        "efficiency": {
            str(count): round(rate * first / (rates[first] * count), 3) for count, rate in rates.items()
        },
        "loader_stall": {
            str(count): statistics.median(run["loader_stall"] for run in runs) for count, runs in found.items()
        },
        "final_loss": {str(count): runs[0]["final_loss"] for count, runs in found.items()},
    }


def run(root: Path, out: Path, workers: int, rows: int, negatives: int) -> dict[str, Any]:
    """One stage from its first to its last step, as the pipeline trains it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training = training_of(rows, negatives, workers)
    train(
        training,
        prepared=Folder.at(str(root)) / "prepared",
        mined=None,
        student=Folder.at(str(root)) / "model",
        teacher=None,
        taught=None,
        out=Folder.at(str(out)),
    )
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    ended = [event.wall_time for event in events.Scalars("loss")]
    place = Place(root, training.settings, "wall", {}, out / "batches")
    tokens = [tokens_of([batch]) for batch in read(place.table, place.store, rank=0, world=1)]
    seconds = [after - before for before, after in pairwise(ended)]
    rates = [count / took for count, took in zip(tokens[1:], seconds, strict=True)]
    facts = json.loads((out / "training.json").read_text())
    return {
        "tokens_per_second": statistics.median(rates[WARM_UP - 1 :]),
        "loader_stall": facts["loader_stall"],
        "final_loss": facts["final_loss"],
    }
