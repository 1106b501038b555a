"""One model measured on evaluation sets, or on the clean part of one; and how long it takes for a query."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from f2llm_ray.base.errors import RunError
from f2llm_ray.engine.names import EngineName
from f2llm_ray.engine.other_models import on_disk, open_folder
from f2llm_ray.evaluate.metrics.scores import LanguageGroups, Measured, columns, dims_of, rounded
from f2llm_ray.evaluate.tasks.registry import main_metric, read_task
from f2llm_ray.evaluate.tasks.retrieval_set import RetrievalSet
from f2llm_ray.evaluate.vectors import Embedder, as_queries, evenly_drawn
from f2llm_ray.model.checkpoint import load_info
from f2llm_ray.run.folder import Folder

QUERIES = 50
"""At most so many are timed."""
FAILURES = "failures.json"


def measure(
    encoder: Embedder,
    sets: Mapping[str, Folder],
    divisors: Sequence[int],
    out: Mapping[str, Folder] | None = None,
) -> dict[str, dict[str, Any]]:
    """`TaskScores` by set, and the `seconds` of each.

    Args:
        encoder: the model.
        sets: by name, the folder that holds the set's set.json.
        divisors: the dims that are measured, as the model's d divided by these.
        out: by name, a folder that gets units.parquet, a row per query, text or pair (`Measured.units`), and
            failures.json, queries that the model fails on (`Measured.failures`).

    Raises:
        RunError: the model returns vectors with NaN or infinity.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, folder in sets.items():
        started = time.perf_counter()
        found = read_task(folder).measure(encoder, divisors)
        results[name] = {**found.scores, "seconds": round(time.perf_counter() - started, 2)}
        if out is not None:
            _write(found, out[name])
    return results


def measure_bm25(sets: Mapping[str, Folder], out: Mapping[str, Folder]) -> dict[str, Any]:
    """BM25 on retrieval sets, inside a Ray task.

    Args:
        sets: by name, the folder that holds the set.
        out: by name, the folder that gets units.parquet.

    Returns:
        As `measure_folder`, at the dim `NO_DIM`.

    Raises:
        DataError: bm25s is not installed.
    """
    begun, results = time.time(), dict[str, dict[str, Any]]()
    for name, folder in sets.items():
        started = time.perf_counter()
        found = RetrievalSet.read(folder).measure_bm25()
        results[name] = {**found.scores, "seconds": round(time.perf_counter() - started, 2)}
        _write(found, out[name])
    return {"results": results, "seconds": round(time.time() - begun, 2)}


def _write(found: Measured, out: Folder) -> None:
    out.write_table("units.parquet", [found.units], found.units.schema)
    out.write_json(FAILURES, list(found.failures))


def measure_folder(
    model: Folder | str,
    sets: Mapping[str, Folder],
    divisors: Sequence[int],
    out: Mapping[str, Folder] | None = None,
    engine: EngineName = "torch",
    layers: int | None = None,
) -> dict[str, Any]:
    """`measure` for a model folder, or the name of a model on the hub, inside a Ray task with one thread.

    With `layers` it is cut to its first so many, in memory; that takes a folder of ours.

    Returns:
        `results`, `TaskScores` by set; `seconds` of the whole; the `engine` that answered.

    Raises:
        RunError: neither we nor sentence-transformers can load the folder, or the hub has no such model.
    """
    import torch

    from f2llm_ray.engine.engine import Engine

    started = time.time()
    torch.set_num_threads(1)
    with on_disk(model) as path:
        encoder = open_folder(path, engine, layers)
        results = measure(encoder, sets, divisors, out)
    answered = encoder.engine if isinstance(encoder, Engine) else "sentence-transformers"
    return {"results": results, "seconds": round(time.time() - started, 2), "engine": answered}


def measure_mixed(
    model: Folder, teacher: Folder, found: Folder, divisors: Sequence[int], document: str | None, out: Folder
) -> dict[str, Any]:
    """The queries of a model against the passages of its teacher on a retrieval set, inside a Ray task.

    Args:
        model: folder of the model that embeds the queries.
        teacher: folder of the one in whose space it ends.
        found: folder of the set.
        divisors: as in `measure`.
        document: what the teacher's passages start with; what its folder says when unset.
        out: gets units.parquet, a row per query.

    Returns:
        `TaskScores`.
    """
    import torch

    torch.set_num_threads(1)
    with model.as_local() as path, teacher.as_local() as other:
        encoder = open_folder(path)
        measured = RetrievalSet.read(found).measure_mixed(encoder, _as_taught(other), divisors, document)
    out.write_table("units.parquet", [measured.units], measured.units.schema)
    return dict(measured.scores)


def _as_taught(folder: Path) -> Embedder:
    """A teacher as it taught: by the engine where that can run it, else by sentence-transformers."""
    from f2llm_ray.engine.engine import Engine

    try:
        load_info(folder)
    except RunError:
        return open_folder(folder)
    return Engine(folder)


def query_ms_of(model: Folder, found: Folder, engine: EngineName) -> float:
    """`query_ms` of a model folder over queries of a set, inside a Ray task with one thread."""
    import torch

    torch.set_num_threads(1)
    task = read_task(found)
    with model.as_local() as path:
        encoder = open_folder(path, engine)
        return query_ms(encoder, as_queries(encoder, task.screened().asked, task.instruction))


def query_ms(encoder: Embedder, queries: Sequence[str]) -> float:
    """Median milliseconds to embed one query by itself, over at most `QUERIES` of them, evenly drawn."""
    texts = [queries[place] for place in evenly_drawn(len(queries), QUERIES)]
    encoder.embed_counted(texts[:1])  # the first call also pays for what is made on first use
    took = []
    for text in texts:
        started = time.perf_counter()
        encoder.embed_counted([text])
        took.append(time.perf_counter() - started)
    return round(1000 * statistics.median(took), 3)


def clean_scores(kind: str, units: pa.Table, contaminated: np.ndarray) -> dict[str, float]:
    """The main metric by dim, as `measured` computes it, over the units that were not trained on; {} without any.

    Args:
        kind: of the task.
        units: the table that measuring the task returned (`Measured.units`).
        contaminated: which of its rows hold a text that was trained on, booleans [n].
    """
    kept = units.filter(pa.array(~contaminated))
    if not len(kept):
        return {}
    groups, dims = LanguageGroups(kept["language"].to_pylist()), dims_of(kept)
    score_lm = groups.scores(main_metric(kind), *columns(kept, dims))
    return {str(dim): rounded(score) for dim, score in zip(dims, groups.weight_l @ score_lm, strict=True)}
