"""From a recipe to its graph. Every stage is declared once: its name, parents, settings, inputs, work and job.

What the stages read from outside the run is looked at, so that the graph knows it by content; nothing is run.
"""

from __future__ import annotations

from f2llm_ray.pipeline import jobs
from f2llm_ray.pipeline.data_stages import DataStages
from f2llm_ray.pipeline.graph import Graph
from f2llm_ray.pipeline.model_stages import ModelStages
from f2llm_ray.pipeline.stage_inputs import StageInputs
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.root import Run
from f2llm_ray.run.stage import Stage


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
    models = ModelStages(recipe, run, inputs, data)
    divisors = list(recipe.evaluation.divisors)
    evaluations = {
        (model.name, name): Stage(
            name=f"evaluate-{model.name}-{name}",
            job=jobs.EVALUATE,
            settings={"divisors": divisors},
            parents={"model": model.stage, "set": found},
        )
        for model in models.models.values()
        for name, found in data.sets.items()
    }
    return Graph(
        recipe=recipe,
        prepare=data.prepare,
        mined=models.mined,
        models=models.models,
        sets=data.sets,
        overlaps=data.overlaps,
        evaluations=evaluations,
    )
