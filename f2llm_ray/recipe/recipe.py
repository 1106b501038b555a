"""The recipe: all that a run is, typed and checked before any work starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Tag, model_validator

from f2llm_ray.base.section import Name, Neutral, Output, Section
from f2llm_ray.data.settings import Data, Source, TokenizerSection
from f2llm_ray.engine.settings import Compute
from f2llm_ray.evaluate.settings import BM25, Evaluation
from f2llm_ray.mine.settings import Mine
from f2llm_ray.model.settings import PARTS, Backbone, Prompts, Prune, Quantize, Soup
from f2llm_ray.serve.settings import Serving
from f2llm_ray.train.settings import Distill, Tracking, TrainStage

UNTRAINED, KEPT, PRUNED, DISTILLED = "untrained", "kept", "pruned", "distilled"
"""What the backbone, what `backbone.keep` keeps of it, and the models of `prune` and `distill` are called."""
PLACES = {KEPT: "backbone.keep", PRUNED: "prune", DISTILLED: "distill"}
"""Where the recipe says the steps that stand outside `stages`."""
MERGED, INT8 = "-merged", "-int8"
"""What the names of merged and quantized models end in, after that of the model they are made from."""
TAKEN = {UNTRAINED, KEPT, PRUNED, DISTILLED, BM25, "prepare", "mined"}
TAKEN_STARTS = ("importance-", "taught-", "set-", "overlap-", "evaluate-", "speed-", "pace-", "mixed-")
"""Names of stages that make no model."""


def _kind(value: Any) -> str:
    """The section that an entry of `stages` is."""
    kind = value.get("kind", "train") if isinstance(value, dict) else getattr(value, "kind", "train")
    return {"prune": "Prune", "distill": "Distill", "soup": "Soup"}.get(kind, "TrainStage")


Step: TypeAlias = Annotated[
    Annotated[TrainStage, Tag("TrainStage")]
    | Annotated[Prune, Tag("Prune")]
    | Annotated[Distill, Tag("Distill")]
    | Annotated[Soup, Tag("Soup")],
    Discriminator(_kind),
]
"""What makes one model from another, or from several, told apart by its `kind`."""


class Recipe(Section):
    """All that a run is."""

    name: Neutral[str]
    """What the run is called in its report, its models' names and its trackers."""
    seed: Output[int] = 0
    """What all chance of the run starts from: first weights, which rows are drawn, and their order."""
    sources: dict[Name, Source]
    """What is trained on, by name; docs/own-data.md has the formats."""
    data: Data = Data()
    tokenizer: TokenizerSection = TokenizerSection()
    backbone: Backbone
    prompts: Prompts = Prompts()
    mine: Mine | None = None
    stages: dict[Name, Step]
    """What makes the run's models, in order. Each goes on from the model before it, or from the one it names, and
    is of a kind: train (the default), prune, distill or soup. May be empty where `prune` or `distill` is set."""
    prune: Prune | None = None
    """The usual end of a recipe: one more step after `stages`, which makes the model "pruned"."""
    distill: Distill | None = None
    """The step after that, which makes the model "distilled"."""
    quantize: Quantize | None = None
    evaluation: Evaluation = Evaluation()
    serving: Serving = Serving()
    compute: Compute = Compute()
    tracking: Tracking = Tracking()

    # What the steps make of each other.

    def steps(self) -> dict[str, TrainStage | Prune | Soup]:
        """All steps in their order, by the name of the model that each makes."""
        keep = self.backbone.keep
        kept = {} if keep is None else {KEPT: Prune(model=UNTRAINED, **keep.model_dump())}
        ends = {PRUNED: self.prune, DISTILLED: self.distill}
        return {**kept, **self.stages, **{name: step for name, step in ends.items() if step is not None}}

    def place_of(self, step: str) -> str:
        """Where the recipe says a step, such as "stages.stage1" or "backbone.keep"."""
        return f"stages.{step}" if step in self.stages else PLACES[step]

    def made_from(self) -> dict[str, str | None]:
        """Every model with float weights in the order they are made, and the one that each is made from."""
        found: dict[str, str | None] = {UNTRAINED: None}
        for name, step in self.steps().items():
            if isinstance(step, Soup):
                found[name] = next((model for model in step.models if model in found), UNTRAINED)
            else:
                found[name] = step.model or list(found)[-1]
            if isinstance(step, TrainStage) and step.merge is not None:
                found[name + MERGED] = name
        return found

    def model_names(self) -> list[str]:
        """Names of all models in the order they are made, quantized ones last."""
        quantized = [] if self.quantize is None else [name + INT8 for name in self.quantize.models]
        return [*self.made_from(), *quantized]

    @property
    def model_tokens(self) -> int:
        """Tokens of the longest text that the run's models take."""
        return self.backbone.max_tokens or self.data.max_tokens

    def lineage(self, model: str) -> list[str]:
        """A model, the one it is made from, and so on to the backbone.

        It ends before a name that comes again: recipes are asked this before a model that is made from itself is
        refused.
        """
        parents, found = self.made_from(), list[str]()
        name: str | None = model
        while name is not None and name not in found:
            found.append(name)
            name = parents.get(name)
        return found

    def prunes_of(self, model: str) -> list[Prune]:
        """The pruning steps between the backbone and a model, the first one first."""
        steps = [self.steps().get(name) for name in reversed(self.lineage(model))]
        return [step for step in steps if isinstance(step, Prune)]

    def reference(self) -> str | None:
        """What smaller models are compared with: the first teacher of the run, else the first model pruned.

        The backbone that `keep` prunes is that only where no model is pruned later.
        """
        parents = self.made_from()
        teachers = [step.teacher for step in self.steps().values() if isinstance(step, Distill)]
        cuts = [name for name, step in self.steps().items() if isinstance(step, Prune)]
        pruned = [parents[name] for name in sorted(cuts, key=KEPT.__eq__)]
        return next((name for name in [*teachers, *pruned] if name in parents), None)

    def measured_exits(self) -> dict[str, tuple[int, ...]]:
        """The exits that are measured, numbers of layers by model: of each chain's last model that has some."""
        steps = self.steps().items()
        elastic = {name: step.exits for name, step in steps if isinstance(step, TrainStage) and step.exits}
        before = {parent for name in elastic for parent in self.lineage(name)[1:]}
        return {name: exits for name, exits in elastic.items() if name not in before}

    def stage_sources(self, stage: TrainStage) -> list[str]:
        """Names of the sources that a stage trains on, in the recipe's order."""
        names = self.sources if stage.sources is None else stage.sources
        return [name for name in names if self.sources[name].task in stage.tasks]

    def mined_sources(self) -> list[str]:
        """Names of the retrieval sources that are mined, in the recipe's order."""
        known = [name for name, source in self.sources.items() if source.task == "retrieval"]
        wanted = None if self.mine is None else self.mine.sources
        return known if wanted is None else [name for name in known if name in wanted]

    # What cannot be.

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = [
            *self._source_problems(),
            *self._step_problems(),
            *self._mine_problems(),
            *self._name_problems(),
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _source_problems(self) -> Iterator[str]:
        if not self.sources:
            yield "sources: at least one is needed"
        for name in self.evaluation.sets:
            if name in self.sources:
                yield f"evaluation.sets.{name}: {name!r} is also a source that is trained on; rename the set"
        if not self.tokenizer.given and self.backbone.path is None:
            yield "tokenizer: set path or train_vocab, since backbone.shape brings no tokenizer"
        if self.model_tokens < self.data.max_tokens:
            yield (
                f"backbone.max_tokens: {self.model_tokens} is less than data.max_tokens ({self.data.max_tokens}), "
                "which the models are trained on"
            )

    def _step_problems(self) -> Iterator[str]:
        if not self.steps():
            yield "stages: at least one is needed, or prune or distill"
        made, parents = [UNTRAINED], self.made_from()
        for name, step in self.steps().items():
            place = self.place_of(name)
            if isinstance(step, Soup):
                for model in step.models:
                    yield from _unknown_model(f"{place}.models", model, made)
            elif step.model is not None and step.model not in made:
                yield f"{place}.model: {step.model!r} is not one of {made}"
            elif isinstance(step, Prune):
                yield from self._prune_problems(place, step, str(parents[name]))
            if isinstance(step, TrainStage):
                yield from self._training_problems(place, step)
                yield from self._exit_problems(place, step, str(parents[name]))
                yield from self._engine_problems(place, step)
            if isinstance(step, Distill):
                yield from _unknown_model(f"{place}.teacher", step.teacher, made)
                if step.teacher == parents[name]:
                    yield (
                        f"{place}.teacher: {step.teacher!r} is the student as well; prune it before, or name "
                        "another model as teacher or as model"
                    )
            made += [model for model in (name, name + MERGED) if model in parents]

    def _prune_problems(self, place: str, step: Prune, parent: str) -> Iterator[str]:
        for part in (part for part in PARTS if part != "vocabulary"):
            has = self._size(parent, part)
            wanted = step.count(part)
            if has is not None and wanted is not None and wanted > has:
                owner = "the backbone" if parent == UNTRAINED or not self.prunes_of(parent) else repr(parent)
                yield f"{place}.{part}: {wanted} is more than {owner}'s {has}"

    def _size(self, model: str, part: Literal["layers", "hidden", "ffn", "kv_heads", "vocabulary"]) -> int | None:
        """How many of a part a model of the run has; None where it comes from a checkpoint."""
        if self.backbone.shape is None:
            return None
        has: int = getattr(self.backbone.shape, part)
        for earlier in self.prunes_of(model):
            has = earlier.count(part) or has
        return has

    def _exit_problems(self, place: str, stage: TrainStage, student: str) -> Iterator[str]:
        has = self._size(student, "layers")
        if has is not None and any(layers >= has for layers in stage.exits):
            yield (
                f"{place}.elastic.layers: found {list(stage.exits)}, expected numbers below {has}, all the layers "
                f"that {student!r} has"
            )

    def _training_problems(self, place: str, stage: TrainStage) -> Iterator[str]:
        unknown = [name for name in stage.sources or () if name not in self.sources]
        if unknown:
            yield f"{place}.sources: {unknown} not among the sources {sorted(self.sources)}"
            return
        terms = [term for term in ("score_margin_weight", "score_kl_weight") if getattr(stage, term)]
        if terms and not stage.negatives.get("retrieval"):
            yield f"{place}.{terms[0]}: compares passages with negatives; give retrieval some in {place}.negatives"
        if not self.stage_sources(stage):
            yield f"{place}: no source has a task in {list(stage.tasks)}"
        for name in self.stage_sources(stage):
            task = self.sources[name].task
            if terms and not self.sources[name].scored:
                yield (
                    f"{place}.{terms[0]}: source {name!r} has no scores; name their column in "
                    f"sources.{name}.columns.scores, or leave it out of {place}.sources"
                )
            if task != "retrieval" and not stage.negatives.get(task):
                yield (
                    f"{place}.negatives: source {name!r} is for {task}, which learns from negatives "
                    f"alone; give {task} at least 1"
                )

    def _engine_problems(self, place: str, stage: TrainStage) -> Iterator[str]:
        most, fewest = self.compute.workers, self.compute.workers_min
        if any(stage.global_batch % count for count in range(fewest or most, most + 1)):
            wanted = f"compute.workers ({most})"
            if fewest is not None:
                wanted = f"every number of workers from compute.workers_min ({fewest}) to {wanted}, any of them"
            yield f"{place}.global_batch: {stage.global_batch} is not a multiple of {wanted}"
        if stage.keep_best and not self.data.validation:
            yield f"{place}.keep_best: needs held-out rows; set data.validation above 0"
        if stage.best_by == "score" and "retrieval" not in stage.tasks:
            yield f"{place}.best_by: the score is taken on retrieval rows, and tasks has {list(stage.tasks)}"
        engine, on_cpu = stage.engine, self.compute.gpus_per_worker == 0
        if engine.precision == "bf16" and on_cpu:
            yield f"{place}.engine.precision: bf16 needs GPUs; use fp32 on CPU"
        if engine.precision == "bf16" and engine.zero_stage == 0:
            yield (
                f"{place}.engine.zero_stage: 0 would sum bf16 gradients in bf16 and keeps no float32 weights by "
                "parameter; use 1, which takes no more memory"
            )
        if engine.offload and on_cpu:
            yield f"{place}.engine.offload: optimizer state is in host memory anyway without GPUs"
        if engine.compile and engine.zero_stage == 3:
            yield f"{place}.engine.compile: ZeRO 3 fetches weights in hooks inside the layers; use 2"
        if engine.offload and engine.zero_stage == 0:
            yield f"{place}.engine.offload: needs zero_stage 1 or more"

    def _mine_problems(self) -> Iterator[str]:
        if self.mine is None:
            return
        model, made = self.mine.model, list(self.made_from())
        yield from _unknown_model("mine.model", model, made)
        known = [name for name, source in self.sources.items() if source.task == "retrieval"]
        wrong = [name for name in self.mine.sources or () if name not in known]
        if wrong or not known:
            yield f"mine.sources: {wrong or 'none'} not among the retrieval sources {known}"
        trained = [name for name, step in self.steps().items() if isinstance(step, TrainStage)]
        if model in made and not any(made.index(name) > made.index(model) for name in trained):
            yield f"mine.model: no training comes after {model!r}"

    def _name_problems(self) -> Iterator[str]:
        for name in self.stages:
            if name in TAKEN or name.startswith(TAKEN_STARTS):
                yield f"stages.{name}: this name is taken"
            if name.endswith((MERGED, INT8)):
                yield f"stages.{name}: a name ending in {MERGED} or {INT8} is that of a model made from another"
        for name, model in self.evaluation.models.items():
            if name in self.model_names():
                yield f"evaluation.baselines: {model!r} would be called {name!r}, as a model of the run is"
        made = list(self.made_from())
        for name in () if self.quantize is None else self.quantize.models:
            if name not in made:
                yield f"quantize.models: {name!r} is not one of {made}"
        if self.serving.model is not None and self.serving.model not in self.model_names():
            yield f"serving.model: {self.serving.model!r} is not one of {self.model_names()}"


def _unknown_model(place: str, model: str, made: list[str]) -> Iterator[str]:
    if model not in made and "/" not in model:
        yield f"{place}: {model!r} is not one of {made}, nor a path of a model folder, which has a /"
