"""The stages of a recipe: what each is made of, and the hash that says whether it must run again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from f2llm_ray.recipe import Recipe
from f2llm_ray.run import Stage

MINED = "mined"


@dataclass(frozen=True)
class Plan:
    """The stages of a recipe, by what they make."""

    prepare: Stage
    mined: Stage | None
    """Hard-negative mining, where the recipe has it."""
    models: dict[str, Stage]
    """Every model in the order they are made: untrained, the contrastive stages, pruned, distilled."""
    evaluations: dict[str, Stage]
    """The evaluation of each model; empty when the recipe names no sets."""

    def stages(self) -> list[Stage]:
        """All stages in the order they run."""
        mined = [] if self.mined is None else [self.mined]
        return [self.prepare, *mined, *self.models.values(), *self.evaluations.values()]


def plan(recipe: Recipe) -> Plan:
    """Works out every stage and its hash; nothing is read or run."""
    dump = recipe.model_dump(mode="json")
    used = ("seed", "sources", "data", "tokenizer", "evaluation")
    prepare = Stage(
        name="prepare",
        settings={
            **{key: dump[key] for key in used},
            "evaluation": dump["evaluation"]["sets"],
            # Models of one tokenizer share the prepared corpus.
            "backbone_tokenizer": None if recipe.tokenizer.given else recipe.backbone.path,
        },
    )
    models = {"untrained": Stage(name="untrained", settings=dump["backbone"], parents=(prepare,))}
    last = models["untrained"]
    mined: Stage | None = None
    if recipe.mine is not None and recipe.mine.model not in recipe.model_names():
        mined = Stage(name=MINED, settings=dump["mine"], parents=(prepare,))
    for name in recipe.stages:
        if recipe.mine is not None and recipe.mine.model == last.name:
            mined = Stage(name=MINED, settings=dump["mine"], parents=(prepare, last))
        parents = (prepare, last) if mined is None else (prepare, last, mined)
        last = models[name] = Stage(name=name, settings=_training(dump, dump["stages"][name]), parents=parents)
    if recipe.mine is not None and recipe.mine.model == last.name:
        mined = Stage(name=MINED, settings=dump["mine"], parents=(prepare, last))
    if recipe.prune is not None:
        models["pruned"] = Stage(
            name="pruned", settings=dump["prune"], parents=(prepare, models[recipe.prune.model])
        )
    if recipe.distill is not None:
        made_from = (prepare, models["pruned"], models[recipe.distill.teacher])
        models["distilled"] = Stage(
            name="distilled",
            settings=_training(dump, dump["distill"]),
            parents=made_from if mined is None else (*made_from, mined),
        )
    evaluations = {}
    if recipe.evaluation.sets:
        settings = {"divisors": dump["evaluation"]["divisors"]}
        evaluations = {
            name: Stage(name=f"evaluate-{name}", settings=settings, parents=(prepare, model))
            for name, model in models.items()
        }
    return Plan(prepare, mined, models, evaluations)


def _training(dump: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    # The world size is not among them: any number of workers sees the same global batches.
    return {**stage, "seed": dump["seed"]}
