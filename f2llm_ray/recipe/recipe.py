"""The recipe: all that a run is, typed and checked before any work starts."""

from __future__ import annotations

from pydantic import model_validator

from f2llm_ray.base.section import Name, Section
from f2llm_ray.data.reading import Source
from f2llm_ray.data.settings import Data, Mine, TokenizerSection
from f2llm_ray.engine.settings import Compute
from f2llm_ray.evaluate.settings import Evaluation
from f2llm_ray.model.settings import Backbone, Prune, Quantize
from f2llm_ray.serve.settings import Serving
from f2llm_ray.train.settings import Distill, Tracking, TrainStage


class Recipe(Section):
    """All that a run is."""

    name: str
    seed: int = 0
    sources: dict[Name, Source]
    data: Data = Data()
    tokenizer: TokenizerSection = TokenizerSection()
    backbone: Backbone
    mine: Mine | None = None
    stages: dict[Name, TrainStage]
    """Contrastive stages in the order they run, each going on from the one before. May be empty where the backbone
    itself is pruned ("untrained")."""
    prune: Prune | None = None
    distill: Distill | None = None
    quantize: Quantize | None = None
    evaluation: Evaluation = Evaluation()
    serving: Serving = Serving()
    compute: Compute = Compute()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = [
            *self._source_problems(),
            *self._stage_problems(),
            *self._mine_problems(),
            *self._shrink_problems(),
            *self._quantize_problems(),
            *self._serving_problems(),
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _source_problems(self) -> list[str]:
        problems = [] if self.sources else ["sources: at least one is needed"]
        problems += [
            f"evaluation.sets.{name}: {name!r} is also a source that is trained on; give the set its own name"
            for name in self.evaluation.sets
            if name in self.sources
        ]
        if self.tokenizer.train_vocab is None and self.tokenizer.path is None and self.backbone.path is None:
            problems.append("tokenizer: set path or train_vocab, since backbone.shape brings no tokenizer")
        return problems

    def _stage_problems(self) -> list[str]:
        problems = [] if self.stages or self.prune else ["stages: at least one is needed, or prune"]
        training: dict[str, TrainStage] = {f"stages.{name}": stage for name, stage in self.stages.items()}
        if self.distill is not None:
            training["distill"] = self.distill
        reserved = {"prepare", "mined", "importance", "taught", "untrained", "pruned", "distilled", "evaluate"}
        problems += [f"stages.{name}: this name is taken" for name in self.stages if name in reserved]
        problems += [
            f"stages.{name}: a name ending in {end} is that of a model made from another"
            for name in self.stages
            for end in ("-merged", "-int8")
            if name.endswith(end)
        ]
        for place, stage in training.items():
            unknown = [name for name in stage.sources or () if name not in self.sources]
            if unknown:
                problems.append(f"{place}.sources: {unknown} not among the sources {sorted(self.sources)}")
            elif not self.stage_sources(stage):
                problems.append(f"{place}: no source has a task in {list(stage.tasks)}")
            problems += [
                f"{place}.negatives: source {name!r} is for {task}, which learns from negatives "
                f"alone; give {task} at least 1"
                for name in ([] if unknown else self.stage_sources(stage))
                for task in [self.sources[name].task]
                if task != "retrieval" and not stage.negatives.get(task)
            ]
            problems += self._engine_problems(place, stage)
        return problems

    def _engine_problems(self, place: str, stage: TrainStage) -> list[str]:
        problems = []
        most, fewest = self.compute.workers, self.compute.workers_min
        if any(stage.global_batch % count for count in range(fewest or most, most + 1)):
            wanted = f"compute.workers ({most})"
            if fewest is not None:
                wanted = f"every number of workers from compute.workers_min ({fewest}) to {wanted}, any of them"
            problems.append(f"{place}.global_batch: {stage.global_batch} is not a multiple of {wanted}")
        if stage.keep_best and not self.data.validation:
            problems.append(f"{place}.keep_best: needs held-out rows; set data.validation above 0")
        if stage.best_by == "score" and "retrieval" not in stage.tasks:
            problems.append(
                f"{place}.best_by: the score is taken on retrieval rows, and tasks has {list(stage.tasks)}"
            )
        engine, on_cpu = stage.engine, self.compute.gpus_per_worker == 0
        if engine.precision == "bf16" and on_cpu:
            problems.append(f"{place}.engine.precision: bf16 needs GPUs; use fp32 on CPU")
        if engine.precision == "bf16" and engine.zero_stage == 0:
            problems.append(
                f"{place}.engine.zero_stage: 0 would sum bf16 gradients in bf16 and keeps no float32 weights by "
                "parameter; use 1, which takes no more memory"
            )
        if engine.offload and on_cpu:
            problems.append(f"{place}.engine.offload: optimizer state is in host memory anyway without GPUs")
        if engine.compile and engine.zero_stage == 3:
            problems.append(f"{place}.engine.compile: ZeRO 3 fetches weights in hooks inside the layers; use 2")
        if engine.offload and engine.zero_stage == 0:
            problems.append(f"{place}.engine.offload: needs zero_stage 1 or more")
        return problems

    def _mine_problems(self) -> list[str]:
        if self.mine is None:
            return []
        problems = []
        problems += self._unknown_model("mine.model", self.mine.model)
        known = self.mined_sources(Mine(model=self.mine.model))
        wrong = [name for name in self.mine.sources or () if name not in known]
        if wrong or not known:
            problems.append(f"mine.sources: {wrong or 'none'} not among the retrieval sources {known}")
        if self.distill is None and self.stages and self.mine.model in self._names_of(list(self.stages)[-1]):
            problems.append(f"mine.model: no training comes after {self.mine.model!r}")
        return problems

    def _shrink_problems(self) -> list[str]:
        problems = []
        if self.distill is not None and self.prune is None:
            problems.append("distill: needs prune, which makes the student")
        if self.prune is not None and self.prune.model not in self.model_names():
            problems.append(f"prune.model: {self.prune.model!r} is not one of {self.model_names()}")
        teacher = None if self.distill is None else self.distill.teacher
        problems += [] if teacher is None else self._unknown_model("distill.teacher", teacher)
        shape = self.backbone.shape
        if self.prune is not None and shape is not None:
            problems += [
                f"prune.{part}: {wanted} is more than the backbone's {getattr(shape, part)}"
                for part in ("layers", "hidden", "ffn", "kv_heads")
                for wanted in [getattr(self.prune, part)]
                if wanted is not None and wanted > getattr(shape, part)
            ]
        return problems

    def _unknown_model(self, place: str, model: str) -> list[str]:
        made = self.model_names()
        known = model in made or "/" in model
        return (
            []
            if known
            else [f"{place}: {model!r} is not one of {made}, nor a path of a model folder, which has a /"]
        )

    def _quantize_problems(self) -> list[str]:
        if self.quantize is None:
            return []
        made = self._float_models()
        return [
            f"quantize.models: {name!r} is not one of {made}" for name in self.quantize.models if name not in made
        ]

    def _serving_problems(self) -> list[str]:
        small = [] if self.quantize is None else [f"{name}-int8" for name in self.quantize.models]
        made = [*self._float_models(), *small]
        known = self.serving.model is None or self.serving.model in made
        return [] if known else [f"serving.model: {self.serving.model!r} is not one of {made}"]

    def _float_models(self) -> list[str]:
        """Names of all models but the quantised ones."""
        made = self.model_names()
        if self.prune is not None:
            made.append("pruned")
        if self.distill is not None:
            made += ["distilled", *(["distilled-merged"] if self.distill.merge else [])]
        return made

    def mined_sources(self, settings: Mine) -> list[str]:
        """Names of the retrieval sources that are mined, in the recipe's order."""
        known = [name for name, source in self.sources.items() if source.task == "retrieval"]
        return known if settings.sources is None else [name for name in known if name in settings.sources]

    def model_names(self) -> list[str]:
        """Names of the models that are there before pruning."""
        return ["untrained", *(name for stage in self.stages for name in self._names_of(stage))]

    def _names_of(self, stage: str) -> list[str]:
        """Names of the models that a contrastive stage makes."""
        return [stage, f"{stage}-merged"] if self.stages[stage].merge else [stage]

    def stage_sources(self, stage: TrainStage) -> list[str]:
        """Names of the sources that a stage trains on, in the recipe's order."""
        names = self.sources if stage.sources is None else stage.sources
        return [name for name in names if self.sources[name].task in stage.tasks]
