"""One model measured on evaluation sets."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from f2llm_ray.evaluate.other_models import open_folder
from f2llm_ray.evaluate.query_time import query_ms
from f2llm_ray.evaluate.tasks.registry import read_task
from f2llm_ray.evaluate.vectors import Embedder, as_queries
from f2llm_ray.run.folder import Folder


class Measurement(TypedDict):
    """What measuring a model folder finds, as JSON values."""

    results: dict[str, dict[str, Any]]
    """`TaskScores` by set."""
    query_ms: float
    """Median milliseconds to embed one query of the first set by itself."""
    seconds: float
    """Duration of the whole measurement."""


def measure(
    encoder: Embedder,
    sets: Mapping[str, Folder],
    divisors: Sequence[int],
    out: Mapping[str, Folder] | None = None,
) -> dict[str, dict[str, Any]]:
    """`TaskScores` by set.

    Args:
        encoder: the model.
        sets: by name, the folder that holds the set's set.json.
        divisors: the dims that are measured, as the model's d divided by these.
        out: by name, a folder that gets units.parquet, a row per query, text or pair (`Measured.units`).

    Raises:
        RunError: the model returns vectors with NaN or infinity.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, folder in sets.items():
        scores, units = read_task(folder).measure(encoder, divisors)
        results[name] = {**scores}
        if out is not None:
            out[name].write_table("units.parquet", [units], units.schema)
    return results


def measure_folder(
    model: Folder,
    sets: Mapping[str, Folder],
    divisors: Sequence[int],
    out: Mapping[str, Folder] | None = None,
) -> Measurement:
    """`measure` for a model folder, inside a Ray task with one thread; also the time that one query takes.

    Raises:
        RunError: neither we nor sentence-transformers can load the folder.
    """
    import torch

    started = time.time()
    torch.set_num_threads(1)
    with model.as_local() as path:
        encoder = open_folder(path)
        results = measure(encoder, sets, divisors, out)
    first = read_task(next(iter(sets.values())))
    took = query_ms(encoder, as_queries(encoder, first.screened().asked, first.instruction))
    return {"results": results, "query_ms": took, "seconds": round(time.time() - started, 2)}
