"""One model measured on all sets of a recipe."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypedDict

from f2llm_ray.evaluate.encode import as_queries
from f2llm_ray.evaluate.other_models import open_folder
from f2llm_ray.evaluate.speed import query_ms
from f2llm_ray.evaluate.tasks.kinds import read_task
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    from f2llm_ray.evaluate.encode import Encoder


class Measurement(TypedDict):
    """What is known of a model after measuring it, as JSON values."""

    results: dict[str, dict[str, Any]]
    """Scores by set."""
    query_ms: float
    """Milliseconds to embed one query of the first set by itself."""
    seconds: float
    """What all of it took."""


def measure(
    encoder: Encoder, sets: Folder, recipe: Recipe, out: Folder | None = None
) -> dict[str, dict[str, Any]]:
    """Scores by set.

    Args:
        encoder: the model.
        sets: where the data steps wrote the recipe's sets.
        recipe: names the sets and the dims.
        out: gets what a comparison needs of each query, text or pair, as `units/<set>.parquet`.

    Raises:
        RunError: the model gives vectors that are not numbers.
    """
    results: dict[str, dict[str, Any]] = {}
    for name in recipe.evaluation.sets:
        scores, units = read_task(sets / name).measure(encoder, recipe.evaluation.divisors)
        results[name] = {**scores}
        if out is not None:
            (out / "units").write_table(f"{name}.parquet", [units], units.schema)
    return results


def measure_folder(model: Folder, sets: Folder, recipe: Recipe, out: Folder | None = None) -> Measurement:
    """`measure` for a model folder, inside a Ray task with one thread; also how long it takes for a query.

    Raises:
        RunError: the folder is no model that we or sentence-transformers can load.
    """
    import torch

    started = time.time()
    torch.set_num_threads(1)
    with model.as_local() as path:
        encoder = open_folder(path)
        results = measure(encoder, sets, recipe, out)
    first = read_task(sets / next(iter(results)))
    queries = as_queries(encoder, first.screened().asked, first.instruction)
    took = query_ms(encoder, queries)
    return {"results": results, "query_ms": took, "seconds": round(time.time() - started, 2)}
