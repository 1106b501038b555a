"""From a recipe to its graph. Every stage is declared once: its name, parents, settings, inputs, work and job.

What the stages read from outside the run is looked at, so that the graph knows it by content; nothing is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from f2llm_ray.evaluate.bm25 import K1, B
from f2llm_ray.evaluate.settings import BM25, baseline_name
from f2llm_ray.evaluate.tasks.retrieval_set import RetrievalSet
from f2llm_ray.pipeline import jobs, work
from f2llm_ray.pipeline.baselines import baseline_files
from f2llm_ray.pipeline.data_stages import DataStages
from f2llm_ray.pipeline.graph import Graph, Mixed, Model
from f2llm_ray.pipeline.model_stages import ModelStages
from f2llm_ray.pipeline.stage_inputs import Sought, StageInputs, places
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.root import Run
from f2llm_ray.run.stage import Stage
from f2llm_ray.train.settings import Distill


def declare(recipe: Recipe, run: Run, *, rescreen: bool = False) -> Graph:
    """Declares all stages of a recipe.

    Args:
        recipe: the recipe.
        run: its root. Data that were prepared there before some evaluation sets came are used as they are.
        rescreen: prepare data again where sets came after them, so that their texts are not trained on.

    Raises:
        DataError: a file that the recipe names is not there, and nothing was made of it before.
        RunError: a folder that should hold a model holds none.
    """
    inputs = StageInputs(run)
    data = DataStages(recipe, run, inputs, rescreen=rescreen)
    models, exits = ModelStages(recipe, run, inputs, data), _exits(recipe)
    return Graph(
        recipe=recipe,
        prepare=data.prepare,
        mined=models.mined,
        models=models.models,
        sets=data.sets,
        overlaps=data.overlaps,
        evaluations=_evaluations(recipe, inputs, models.models, exits, data.sets),
        exits=exits,
        speeds=_speeds(recipe, run, models.models, data.sets),
        mixed=_mixed(recipe, run, models, data.sets),
    )


def _evaluations(
    recipe: Recipe,
    inputs: StageInputs,
    models: Mapping[str, Model],
    exits: Mapping[str, tuple[str, int]],
    sets: Mapping[str, Stage],
) -> dict[tuple[str, str], Stage]:
    """Of every model, exit, baseline and BM25 on every set that it can be scored on."""
    divisors = {"divisors": list(recipe.evaluation.divisors)}
    found = {}
    for name, of_set in sets.items():
        if recipe.evaluation.bm25 and recipe.evaluation.sets[name].kind == RetrievalSet.kind:
            found[BM25, name] = _evaluation(BM25, name, {"k1": K1, "b": B}, {"set": of_set})
    for model, place in recipe.evaluation.models.items():
        sought = {"model": Sought(place, partial(baseline_files, place))}
        for name, of_set in sets.items():
            stage = _evaluation(model, name, divisors, {"set": of_set})
            files = inputs.find(stage.name, sought)
            found[model, name] = replace(stage, inputs=files, places=places(sought))
    for model, made in models.items():
        for name, of_set in sets.items():
            found[model, name] = _evaluation(model, name, divisors, {"model": made.stage, "set": of_set})
    for cut, (model, layers) in exits.items():
        for name, of_set in sets.items():
            parents = {"model": models[model].stage, "set": of_set}
            found[cut, name] = _evaluation(cut, name, {**divisors, "layers": layers}, parents)
    return found


def _exits(recipe: Recipe) -> dict[str, tuple[str, int]]:
    """The exits that are measured, as `Graph` has them."""
    found = recipe.measured_exits().items()
    return {f"{model}@{layers}": (model, layers) for model, exits in found for layers in exits}


def _evaluation(model: str, name: str, settings: dict[str, Any], parents: Mapping[str, Stage]) -> Stage:
    return Stage(name=f"evaluate-{model}-{name}", job=jobs.EVALUATE, settings=settings, parents=parents)


def _mixed(recipe: Recipe, run: Run, made: ModelStages, sets: Mapping[str, Stage]) -> dict[tuple[str, str], Mixed]:
    """Of each model that ends in the space of a teacher which is a model too, on each retrieval set."""
    found, retrieval = {}, {name for name, of in recipe.evaluation.sets.items() if of.kind == RetrievalSet.kind}
    for name, model in made.models.items():
        step = joined_by(recipe, made.models, name)
        if step is None or not step.teaches_by_model:
            continue
        parents = {"model": model.stage}
        inputs, seen = made.teacher(f"mixed-{name}", step, parents)
        for of_set in (of_set for of_set in sets if of_set in retrieval):
            settings = {"divisors": list(recipe.evaluation.divisors), "document": step.teacher_prompts.document}
            stage = Stage(
                name=f"mixed-{name}-{of_set}",
                job=jobs.EVALUATE,
                settings=settings,
                inputs=inputs,
                places=seen,
                parents={**parents, "set": sets[of_set]},
                work=partial(
                    work.measure_mixed,
                    run.folder(model.stage) / "model",
                    made.folder_of(step.teacher),
                    run.folder(sets[of_set]),
                    divisors=recipe.evaluation.divisors,
                    document=step.teacher_prompts.document,
                    compute=recipe.compute,
                ),
            )
            teacher = step.teacher if step.teacher in made.models else baseline_name(step.teacher)
            found[name, of_set] = Mixed(teacher, stage)
    return found


def joined_by(recipe: Recipe, models: Mapping[str, Model], name: str) -> Distill | None:
    """The step after which a model ends in its teacher's space: its own, or that of the one it is a copy of."""
    step, parent = recipe.steps().get(name), models[name].made_from
    if step is None:  # merged checkpoints, or int8 weights
        return None if parent is None else joined_by(recipe, models, parent)
    return step if isinstance(step, Distill) and step.joins_teacher else None


def _speeds(recipe: Recipe, run: Run, models: Mapping[str, Model], sets: Mapping[str, Stage]) -> dict[str, Stage]:
    """How long each model takes for a query of the first set."""
    return {
        name: Stage(
            name=f"speed-{name}",
            job=jobs.EVALUATE,
            settings={},
            parents={"model": model.stage, "set": of_set},
            work=partial(
                work.measure_speed, run.folder(model.stage) / "model", run.folder(of_set), recipe.compute
            ),
        )
        for of_set in list(sets.values())[:1]
        for name, model in models.items()
    }
