"""Any models side by side on a recipe's sets: those of the run, other folders, and endpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.progress import say
from f2llm_ray.evaluate.measure import measure, measure_folder
from f2llm_ray.evaluate.metrics.differences import differences
from f2llm_ray.evaluate.other_models import Endpoint, is_endpoint
from f2llm_ray.pipeline.pipeline import Pipeline
from f2llm_ray.run.folder import Folder

DONE = "results.json"
"""Written last into the folder of a model from outside the run."""


def compare(pipeline: Pipeline, models: Sequence[str]) -> list[dict[str, Any]]:
    """Each further model against the first (`evaluate.differences`).

    Models of the run must be evaluated. Others are measured here and leave `compared/` in the root; a folder that
    was measured before on the same data is not measured again, an endpoint is asked each time.

    Args:
        pipeline: the run.
        models: names of the run's models, model folders (ours or of sentence-transformers), or endpoints as
            URL#NAME.

    Raises:
        RunError: there are fewer than two different ones, or one is not finished, measured or found.
    """
    if len(set(models)) < 2:
        raise RunError(f"compare: found {list(models)}, expected two or more different models")
    names = list(pipeline.recipe.evaluation.sets)
    if not names:
        raise RunError("compare: the recipe has no evaluation.sets to compare on")
    sets = pipeline.run.require(pipeline.plan.prepare, "jobs/prepare.py") / "sets"
    places = {model: _place(pipeline, model) for model in dict.fromkeys(models)}
    _measure(pipeline, sets, {m: place for m, place in places.items() if m not in pipeline.plan.models})
    for model, place in places.items():
        if not (place / "units").exists(f"{names[0]}.parquet"):
            raise RunError(f"{model}: {place.uri} is from before comparisons; remove it and run jobs/evaluate.py")
    kinds = {name: (sets / name).read_json("set.json")["kind"] for name in names}
    units = {
        model: {name: (place / "units").read_table(f"{name}.parquet") for name in names}
        for model, place in places.items()
    }
    return differences(kinds, units)


def _place(pipeline: Pipeline, model: str) -> Folder:
    """Where the measurements of a model are or will be."""
    from f2llm_ray.model.fingerprint import fingerprint

    if model in pipeline.plan.models:
        return pipeline.run.require(pipeline.plan.evaluations[model], "jobs/evaluate.py")
    if is_endpoint(model):
        told = model
    else:
        folder = Folder.at(model)
        if not folder.files(".safetensors"):
            made = list(pipeline.plan.models)
            raise RunError(
                f"{model}: neither a model of the run ({made}) nor a folder with safetensors, nor URL#NAME"
            )
        told = fingerprint(folder)
    evaluation = pipeline.recipe.evaluation
    what = [told, pipeline.plan.prepare.folder_name, list(evaluation.sets), list(evaluation.divisors)]
    key = hashlib.blake2b(json.dumps(what).encode(), digest_size=8).hexdigest()
    return pipeline.run.root / "compared" / key


def _measure(pipeline: Pipeline, sets: Folder, places: dict[str, Folder]) -> None:
    """Measures what is not measured: folders where a model can run, endpoints from here, where the key is."""
    import ray

    folders = {model: place for model, place in places.items() if not is_endpoint(model)}
    new = {model: place for model, place in folders.items() if not place.exists(DONE)}
    for model in folders.keys() - new:
        say(f"{model}: measured before")
    work = pipeline.work.task(measure_folder)
    results = ray.get([work.remote(Folder.at(m), sets, pipeline.recipe, place) for m, place in new.items()])
    for (model, place), found in zip(new.items(), results, strict=True):
        place.write_json(DONE, {"model": model, **found})
    for model in places.keys() - folders:
        say(f"{model}: asked for vectors")
        found = measure(Endpoint(model), sets, pipeline.recipe, places[model])
        places[model].write_json(DONE, {"model": model, "results": found})
