"""The stages of a recipe: what each is made of, and the hash that says whether it must run again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from f2llm_ray.model.settings import PARTS
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Stage
from f2llm_ray.train.settings import TrainStage

MINED, IMPORTANCE, TAUGHT = "mined", "importance", "taught"
DISTILLED = "distilled"
MERGED, INT8 = "-merged", "-int8"
"""What the names of merged and quantised models end in, after that of the model they are made from."""
NOT_BATCHES = frozenset(
    {
        "teacher_vectors",
        "mse_weight",
        "cosine_weight",
        "similarity_weight",
        "similarity_temperature",
        "projection",
        "temperature",
        "temperatures",
        "hard_negative_weight",
        "in_batch_weight",
        "absolute_margin",
        "relative_margin",
        "matryoshka_min_dim",
        "gather_gradient",
        "lr",
        "min_lr",
        "warmup_steps",
        "weight_decay",
        "betas",
        "clip",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_best",
        "best_by",
        "merge",
        "engine",
    }
)
"""Settings of a distillation that leave its batches as they are, and so the teacher's vectors of them."""


@dataclass(frozen=True)
class Plan:
    """The stages of a recipe, by what they make."""

    prepare: Stage
    mined: Stage | None
    """Hard-negative mining, where the recipe has it."""
    importance: Stage | None
    """Scores of the parts of the model that is pruned, where the recipe prunes."""
    taught: Stage | None
    """The teacher's vectors, where the recipe distils from cached ones."""
    models: dict[str, Stage]
    """Every model in the order they are made: untrained, the contrastive stages, pruned, distilled, each merged
    one after what it is made from, and quantised ones."""
    evaluations: dict[str, Stage]
    """The evaluation of each model; empty when the recipe names no sets."""

    def stages(self) -> list[Stage]:
        """All stages in the order they run."""
        between = [stage for stage in (self.mined, self.importance, self.taught) if stage is not None]
        return [self.prepare, *between, *self.models.values(), *self.evaluations.values()]


def plan(recipe: Recipe) -> Plan:
    """Works out every stage and its hash; nothing is read or run."""
    dump = recipe.model_dump(mode="json")
    used = ("seed", "data", "tokenizer", "evaluation")
    prepare = Stage(
        name="prepare",
        settings={
            **{key: dump[key] for key in used},
            # How often a row is seen is decided by each stage that trains on it.
            "sources": {
                name: {key: value for key, value in source.items() if key != "weight"}
                for name, source in dump["sources"].items()
            },
            # Batches are drawn from them in turn, and the first one's instruction is the model's default prompt.
            "order": list(recipe.sources),
            "evaluation": dump["evaluation"]["sets"],
            # Models of one tokenizer share the prepared corpus.
            "backbone_tokenizer": None if recipe.tokenizer.given else recipe.backbone.path,
        },
    )
    models = {"untrained": Stage(name="untrained", settings=dump["backbone"], parents=(prepare,))}
    last = models["untrained"]
    mined: Stage | None = None
    importance: Stage | None = None
    for name in recipe.stages:
        mined = _mining(recipe, dump, prepare, models)
        parents = (prepare, last) if mined is None else (prepare, last, mined)
        last = models[name] = Stage(name=name, settings=_training(recipe, recipe.stages[name]), parents=parents)
        last = _merging(models, name, dump["stages"][name]["merge"], prepare)
    mined = _mining(recipe, dump, prepare, models)
    if recipe.prune is not None:
        parent, cut = models[recipe.prune.model], dump["prune"]
        scored = ("importance", "calibration_rows")
        # Its own stage, so that a recipe with another shape in the same root finds the scores.
        importance = Stage(name=IMPORTANCE, settings={key: cut[key] for key in scored}, parents=(prepare, parent))
        models["pruned"] = Stage(
            name="pruned", settings={part: cut[part] for part in PARTS}, parents=(prepare, parent, importance)
        )
    taught: Stage | None = None
    if recipe.distill is not None:
        common = () if mined is None else (mined,)
        teacher = models.get(recipe.distill.teacher)
        teachers = () if teacher is None or not recipe.distill.uses_teacher else (teacher,)
        if recipe.distill.uses_teacher and recipe.distill.teacher_vectors == "cached":
            taught = Stage(name=TAUGHT, settings=_teaching(recipe, dump), parents=(prepare, *teachers, *common))
            teachers = (taught,)
        models[DISTILLED] = Stage(
            name=DISTILLED,
            settings=_training(recipe, recipe.distill),
            parents=(prepare, models["pruned"], *teachers, *common),
        )
        _merging(models, DISTILLED, dump["distill"]["merge"], prepare)
    if recipe.quantize is not None:
        for name in recipe.quantize.models:
            small = name + INT8
            models[small] = Stage(
                name=small, settings={"embeddings": recipe.quantize.embeddings}, parents=(prepare, models[name])
            )
    evaluations = {}
    if recipe.evaluation.sets:
        settings = {"divisors": dump["evaluation"]["divisors"]}
        evaluations = {
            name: Stage(name=f"evaluate-{name}", settings=settings, parents=(prepare, model))
            for name, model in models.items()
        }
    return Plan(prepare, mined, importance, taught, models, evaluations)


def _teaching(recipe: Recipe, dump: dict[str, Any]) -> dict[str, Any]:
    stage = recipe.distill
    assert stage is not None  # noqa: S101 - the stage is made from it
    assert recipe.prune is not None  # noqa: S101 - the student is made by it
    batches = {key: value for key, value in _training(recipe, stage).items() if key not in NOT_BATCHES}
    # A student whose hidden size is not named has that of the backbone.
    width = recipe.prune.hidden or dump["backbone"]
    return {**batches, "dims": width if stage.teacher_is_cut else None}


def _mining(recipe: Recipe, dump: dict[str, Any], prepare: Stage, models: dict[str, Stage]) -> Stage | None:
    """The mining, once the model that mines is among those made."""
    if recipe.mine is None:
        return None
    model = recipe.mine.model
    if model not in models and model in recipe.model_names():
        return None
    return Stage(
        name=MINED, settings=dump["mine"], parents=(prepare, models[model]) if model in models else (prepare,)
    )


def _merging(models: dict[str, Stage], name: str, settings: dict[str, Any] | None, prepare: Stage) -> Stage:
    """What comes after a training goes on from this: its merged model where it has one, else its own."""
    if settings is None:
        return models[name]
    merged = models[name + MERGED] = Stage(name=name + MERGED, settings=settings, parents=(prepare, models[name]))
    return merged


def _training(recipe: Recipe, stage: TrainStage) -> dict[str, Any]:
    # The world size is not among them: any number of workers sees the same global batches.
    # Nor is what is made of a finished stage.
    settings = {key: value for key, value in stage.model_dump(mode="json").items() if key != "merge"}
    weights = {name: recipe.sources[name].weight for name in recipe.stage_sources(stage)}
    return {**settings, "weights": weights, "seed": recipe.seed}
