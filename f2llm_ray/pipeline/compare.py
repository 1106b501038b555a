"""Any models side by side on a recipe's sets: those of the run, other folders, and endpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.progress import say
from f2llm_ray.engine.other_models import RemoteModel
from f2llm_ray.evaluate.differences import differences
from f2llm_ray.evaluate.measure import measure, measure_folder
from f2llm_ray.model.checkpoint import fingerprint
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.stage import short_hash
from f2llm_ray.train.settings import is_endpoint

DONE = "results.json"
"""Written last into the folder of a model from outside the run."""


def compare(pipeline: Pipeline, models: Sequence[str]) -> list[dict[str, Any]]:
    """Each further model against the first (`differences`).

    Models of the run must be evaluated, and its baselines are as they were measured. Others are measured here and
    leave `compared/` in the root; a folder that was measured before on the same sets is not measured again, an
    endpoint is asked each time.

    Args:
        pipeline: the run.
        models: names of the run's models, model folders (ours or of sentence-transformers), or endpoints as
            URL#NAME.

    Raises:
        RunError: there are fewer than two different ones, or one is not finished, measured or found.
    """
    graph, places = pipeline.graph, _all_places(pipeline, models)
    names, sets = list(graph.sets), pipeline.set_folders()
    _measure(pipeline, sets, {m: place for m, place in places.items() if _of_run(pipeline, m) is None})
    kinds = {name: sets[name].read_json("set.json")["kind"] for name in names}
    units = {
        model: {name: of_sets[name].read_table("units.parquet") for name in names}
        for model, of_sets in places.items()
    }
    return differences(kinds, units)


def dry_run(pipeline: Pipeline, models: Sequence[str]) -> list[str]:
    """A line for each model: what it would be measured on. Raises as `compare`."""
    lines = []
    for model, place in _all_places(pipeline, models).items():
        new = () if _of_run(pipeline, model) is not None else _missing(model, place)
        names = ", ".join(new)
        lines.append(f"{model}: would be measured on {names}" if names else f"{model}: measured before")
    return lines


def _all_places(pipeline: Pipeline, models: Sequence[str]) -> dict[str, dict[str, Folder]]:
    """`_places` of each model."""
    if len(set(models)) < 2:
        raise RunError(f"compare: found {list(models)}, expected two or more different models")
    if not pipeline.graph.sets:
        raise RunError("compare: the recipe has no evaluation.sets to compare on")
    return {model: _places(pipeline, model) for model in dict.fromkeys(models)}


def _missing(model: str, place: Mapping[str, Folder]) -> dict[str, Folder]:
    """Where a model from outside the run is to be measured: an endpoint, which may change, on all sets."""
    return {name: folder for name, folder in place.items() if is_endpoint(model) or not folder.exists(DONE)}


def _of_run(pipeline: Pipeline, model: str) -> str | None:
    """The name by which the run itself measures a model: one that it makes, or a baseline by its name or place."""
    graph, others = pipeline.graph, pipeline.recipe.evaluation.models
    found = next((name for name, place in others.items() if model in (name, place)), None)
    measured = (pipeline.run.manifest(graph.evaluations[found, name]) for name in graph.sets if found is not None)
    return model if model in graph.models else found if found is not None and None not in measured else None


def _places(pipeline: Pipeline, model: str) -> dict[str, Folder]:
    """Where the measurements of a model are or will be, by set."""
    graph, root = pipeline.graph, pipeline.run.root
    own = _of_run(pipeline, model)
    if own is not None:
        return {name: pipeline.run.require(graph.evaluations[own, name]) for name in graph.sets}
    if is_endpoint(model):
        identity = model
    else:
        folder = Folder.at(model)
        if not folder.files(".safetensors"):
            made = list(graph.models)
            raise RunError(
                f"{model}: neither a model of the run ({made}) nor a folder with safetensors, nor URL#NAME"
            )
        identity = fingerprint(folder)
    divisors = list(pipeline.recipe.evaluation.divisors)
    return {
        name: root / "compared" / f"{name}-{short_hash([identity, stage.hash, divisors])}"
        for name, stage in graph.sets.items()
    }


def _measure(pipeline: Pipeline, sets: Mapping[str, Folder], places: Mapping[str, Mapping[str, Folder]]) -> None:
    """Measures what is not measured: folders where a model can run, endpoints from here, where the key is."""
    import ray

    divisors, gpus = pipeline.recipe.evaluation.divisors, 1 if pipeline.recipe.compute.gpus_per_worker else 0
    work, pending = ray.remote(num_cpus=1, num_gpus=gpus)(measure_folder), {}
    for model, place in places.items():
        new = _missing(model, place)
        if not new:
            say(f"{model}: measured before")
        elif not is_endpoint(model):
            pending[model] = work.remote(Folder.at(model), {name: sets[name] for name in new}, divisors, new)
    found = {model: ray.get(done)["results"] for model, done in pending.items()}
    for model in filter(is_endpoint, places):
        say(f"{model}: asked for vectors")
        found[model] = measure(RemoteModel(model), sets, divisors, places[model])
    for model, results in found.items():
        for name, result in results.items():
            places[model][name].write_json(DONE, {"model": model, "result": result})
