"""The recipe: all that a run is, typed and checked before any work starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from f2llm_ray.data.schema import TASKS, Task
from f2llm_ray.data.settings import Data, Mine, TokenizerSection
from f2llm_ray.data.sources import Source
from f2llm_ray.data.sources.base import DEFAULT_INSTRUCTION
from f2llm_ray.errors import RecipeError
from f2llm_ray.model.sizes import Shape
from f2llm_ray.section import Section

Settings = dict[str, Any]
SectionT = TypeVar("SectionT", bound=Section)


class Backbone(Section):
    """The model that training starts from: a checkpoint, or a random one of a given shape."""

    path: str | None = None
    """Hub name or local folder of a decoder checkpoint."""
    shape: Shape | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Backbone:
        if (self.path is None) == (self.shape is None):
            raise ValueError("set exactly one of path and shape")
        return self


class Engine(Section):
    """The DeepSpeed engine and the shape of the work on each worker."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16"] = "bf16"
    offload: bool = False
    """Optimizer state in host memory."""
    tokens_per_pass: int = Field(default=16_384, ge=64)
    """Token budget of one forward pass of the encoder; a micro-batch is cut into passes of similar lengths."""
    tokens_per_chunk: int | None = Field(default=None, ge=64)
    """GradCache: the activations of at most this many tokens are held at a time, at the cost of a second forward
    pass; unset holds those of the whole batch."""
    gradient_checkpointing: bool = False
    loader_prefetch: int = Field(default=4, ge=1)
    """Micro-batches that Ray Data keeps ready ahead of the step."""


class TrainStage(Section):
    """One contrastive stage. The defaults are those of the paper's public code."""

    tasks: tuple[Task, ...] = TASKS
    """Tasks whose sources are used."""
    sources: tuple[str, ...] | None = None
    """Names of the sources that are used; all with a fitting task when unset."""
    instructions: bool = True
    """Put each source's instruction before its queries."""
    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    """Ends the stage early; the schedule is stretched over the steps that are run."""
    global_batch: int = Field(default=512, ge=2)
    """Rows per optimizer step over all workers."""
    language_temperature: float = Field(default=1.0, ge=1)
    """Evens out the languages of a source: one of n rows is drawn in proportion to n^(1/temperature)."""
    length_window: int = Field(default=1, ge=1)
    """Global batches whose rows are sorted by length before they are cut, so that a batch has similar lengths; 1
    leaves lengths mixed."""
    negatives: dict[Task, int] = {"retrieval": 7, "clustering": 9, "classification": 1}
    """Hard negatives drawn per row and epoch."""
    temperature: float = Field(default=0.05, gt=0)
    temperatures: dict[Task, float] = {}
    """Another temperature for some tasks."""
    hard_negative_weight: float = Field(default=1.0, ge=0)
    in_batch_weight: float = Field(default=1.0, ge=0)
    absolute_margin: float | None = None
    """Negatives whose cosine is above the passage's minus this are taken for false ones and left out; -0.1 leaves
    out what is better than the passage by 0.1 (Qwen3-Embedding). Unset in the paper."""
    relative_margin: float | None = Field(default=None, ge=0, le=1)
    """The same with this share of the passage's cosine: 0.05 leaves out what is above 95 % of it."""
    matryoshka_min_dim: int = Field(default=8, ge=1)
    """Smallest matryoshka dim; the dims are its doublings below the hidden size, and the hidden size."""
    gather_gradient: bool = True
    """Gradient to other ranks' passages in the in-batch term; the paper's code has none."""
    lr: float = Field(default=8e-6, gt=0)
    min_lr: float = Field(default=1e-7, ge=0)
    warmup_steps: int = Field(default=500, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """The last ones are kept; with `keep_best` those with the lowest validation loss, and the last."""
    keep_best: bool = False
    """Export the checkpoint with the lowest validation loss instead of the last step (paper: the last)."""
    engine: Engine = Engine()

    @model_validator(mode="after")
    def _rates(self) -> TrainStage:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must not exceed lr ({self.lr})")
        return self


class Prune(Section):
    """Structured pruning of a trained stage into a smaller stock model."""

    model: str
    """The stage to prune."""
    layers: int = Field(ge=1)
    hidden: int = Field(ge=8)
    ffn: int = Field(ge=8)
    calibration_rows: int = Field(default=512, ge=1)
    """Training rows whose texts the importance scores are measured on, drawn over all sources."""


class Distill(TrainStage):
    """Training of the pruned model towards a teacher, beside the contrastive loss."""

    teacher: str
    """The stage whose model is the teacher."""
    mse_weight: float = Field(default=1.0, ge=0)
    """Weight of the MSE between un-normalised vectors and the teacher's first dims (paper: 1)."""


class FolderSet(Section):
    """A retrieval set on disk in the BEIR layout: queries, corpus and qrels, each .parquet or .jsonl."""

    folder: str
    instruction: str = DEFAULT_INSTRUCTION["retrieval"]
    max_queries: int | None = Field(default=None, ge=1)


class SourceSet(Section):
    """A retrieval set made of a source that is never trained on: its queries against all its passages."""

    source: Source
    max_queries: int | None = Field(default=None, ge=1)
    """At most this many queries, drawn by content hash; the corpus stays whole."""


class Evaluation(Section):
    """What every model of the run is measured on."""

    sets: dict[str, FolderSet | SourceSet] = {}
    divisors: tuple[int, ...] = (1, 2, 4, 8)
    """The dims measured, as d divided by these."""


class Serving(Section):
    """Limits of the endpoint; every one is shown by /info."""

    model: str | None = None
    """The stage that is served; the last one of the run when unset."""
    max_inputs: int = Field(default=2048, ge=1)
    """Texts per request."""
    max_tokens: int = Field(default=8192, ge=2)
    """Tokens per text, EOS included."""
    max_body_bytes: int = Field(default=10_000_000, ge=1024)
    max_queued: int = Field(default=512, ge=1)
    """Requests waiting or running per replica; beyond it the answer is 429."""
    batch_tokens: int = Field(default=16_384, ge=64)
    """Token budget of one forward pass."""


class Compute(Section):
    """What the run asks of the cluster."""

    workers: int = Field(default=1, ge=1)
    """World size of training."""
    workers_min: int | None = Field(default=None, ge=1)
    """Elastic training: goes on with this many workers or more, up to `workers`, as nodes come and go; each change
    starts again from the last checkpoint."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    gpus_per_worker: float = Field(default=0.0, ge=0)
    threads_per_worker: int = Field(default=1, ge=1)
    """Torch threads of a worker on CPU."""
    max_failures: int = Field(default=3, ge=0)
    """Times a stage goes on from its last checkpoint after losing a worker."""

    @model_validator(mode="after")
    def _elastic(self) -> Compute:
        if self.workers_min is not None and self.workers_min > self.workers:
            raise ValueError(f"workers_min ({self.workers_min}) must not exceed workers ({self.workers})")
        return self


class Recipe(Section):
    """All that a run is."""

    name: str
    seed: int = 0
    sources: dict[str, Source]
    data: Data = Data()
    tokenizer: TokenizerSection = TokenizerSection()
    backbone: Backbone
    mine: Mine | None = None
    stages: dict[str, TrainStage]
    """Contrastive stages in the order they run, each going on from the one before."""
    prune: Prune | None = None
    distill: Distill | None = None
    evaluation: Evaluation = Evaluation()
    serving: Serving = Serving()
    compute: Compute = Compute()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = [
            *self._source_problems(),
            *self._stage_problems(),
            *self._mine_problems(),
            *self._shrink_problems(),
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
        problems = [] if self.stages else ["stages: at least one is needed"]
        training: dict[str, TrainStage] = {f"stages.{name}": stage for name, stage in self.stages.items()}
        if self.distill is not None:
            training["distill"] = self.distill
        reserved = {"prepare", "mined", "untrained", "pruned", "distilled", "evaluate"}
        problems += [f"stages.{name}: this name is taken" for name in self.stages if name in reserved]
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
        if engine.offload and engine.zero_stage == 0:
            problems.append(f"{place}.engine.offload: needs zero_stage 1 or more")
        return problems

    def _mine_problems(self) -> list[str]:
        if self.mine is None:
            return []
        problems = []
        known = self.mined_sources(Mine(model=self.mine.model))
        wrong = [name for name in self.mine.sources or () if name not in known]
        if wrong or not known:
            problems.append(f"mine.sources: {wrong or 'none'} not among the retrieval sources {known}")
        if self.distill is None and self.stages and self.mine.model == list(self.stages)[-1]:
            problems.append(f"mine.model: no training comes after {self.mine.model!r}")
        return problems

    def _shrink_problems(self) -> list[str]:
        problems = []
        if self.distill is not None and self.prune is None:
            problems.append("distill: needs prune, which makes the student")
        if self.prune is not None and self.prune.model not in self.stages:
            problems.append(f"prune.model: {self.prune.model!r} is not one of {list(self.stages)}")
        if self.distill is not None and self.distill.teacher not in self.stages:
            problems.append(f"distill.teacher: {self.distill.teacher!r} is not one of {list(self.stages)}")
        shape = self.backbone.shape
        if self.prune is not None and shape is not None:
            problems += [
                f"prune.{part}: {getattr(self.prune, part)} is more than the backbone's {getattr(shape, part)}"
                for part in ("layers", "hidden", "ffn")
                if getattr(self.prune, part) > getattr(shape, part)
            ]
        return problems

    def mined_sources(self, settings: Mine) -> list[str]:
        """Names of the retrieval sources that are mined, in the recipe's order."""
        known = [name for name, source in self.sources.items() if source.task == "retrieval"]
        return known if settings.sources is None else [name for name in known if name in settings.sources]

    def model_names(self) -> list[str]:
        """Names of the models that are there before pruning."""
        return ["untrained", *self.stages]

    def stage_sources(self, stage: TrainStage) -> list[str]:
        """Names of the sources that a stage trains on, in the recipe's order."""
        names = self.sources if stage.sources is None else stage.sources
        return [name for name in names if self.sources[name].task in stage.tasks]


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("f2llm_ray") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe by built-in name or path, follows `extends`, applies `key=value` overrides, validates.

    Raises:
        RecipeError: unreadable file, unknown key or value (with the place and what is allowed), or an
            impossible combination.
    """
    settings = _read(name_or_path, ())
    for override in overrides:
        _apply(settings, override)
    return parse(Recipe, settings, name_or_path)


def parse(section: type[SectionT], settings: Mapping[str, Any], where: str) -> SectionT:
    """Validates settings, with every problem on a line of its own.

    Raises:
        RecipeError: the settings do not fit.
    """
    try:
        return section.model_validate(settings)
    except ValidationError as error:
        lines = [_describe(section, details) for details in error.errors()]
        raise RecipeError(f"{where}: " + "\n  ".join(["the recipe does not fit:", *lines])) from None


def _read(name_or_path: str, seen: tuple[Path, ...]) -> Settings:
    path = _locate(name_or_path, seen[-1].parent if seen else None)
    if path in seen:
        raise RecipeError(f"{path}: extends itself through {' -> '.join(map(str, seen))}")
    try:
        text = path.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise RecipeError(f"{path}: found {type(settings).__name__}, expected a mapping of settings")
    base = settings.pop("extends", None)
    return settings if base is None else _merge(_read(str(base), (*seen, path)), settings)


def _locate(name_or_path: str, beside: Path | None) -> Path:
    candidates = [Path(name_or_path)] if beside is None else [beside / name_or_path, Path(name_or_path)]
    candidates.append(Path(str(resources.files("f2llm_ray"))) / "recipes" / f"{name_or_path}.yaml")
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    raise RecipeError(
        f"recipe {name_or_path!r}: no such file, and not one of the built-in recipes {builtin_recipes()}"
    )


def _merge(base: Settings, changes: Mapping[str, Any]) -> Settings:
    """Lays changes over a base: mappings merge key by key, everything else is replaced; null removes a key."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _apply(settings: Settings, override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {override!r}: expected a.b=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not valid YAML: {error}") from None
    place = settings
    for part in parts[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise RecipeError(f"--set {override!r}: {part!r} holds a single value, not further keys")
    place[parts[-1]] = value


def _describe(section: type[Section], details: Any) -> str:
    where = ".".join(str(part) for part in details["loc"])
    if details["type"] == "extra_forbidden":
        allowed = _allowed(section, details["loc"][:-1])
        return f"{where}: unknown key" + (f"; allowed here: {', '.join(allowed)}" if allowed else "")
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] in {"missing", "value_error"}:
        return f"{where}: {message}" if where else message
    return f"{where}: {message}; found {details['input']!r}"


def _allowed(section: type[Section], path: Sequence[str | int]) -> list[str]:
    """Keys known at a path of an error; names of a mapping and tags of a union are steps of that path too."""
    kinds = [section]
    for part in map(str, path):
        below = [leaf for kind in kinds for leaf in _leaves(kind.model_fields.get(part))]
        tagged = [kind for kind in kinds if part == getattr(kind.model_fields.get("format"), "default", None)]
        kinds = below or tagged or kinds
    return sorted({name for kind in kinds for name in kind.model_fields})


def _leaves(annotation: Any) -> list[type[Section]]:
    """The sections inside a field or annotation such as dict[str, A | B]."""
    annotation = getattr(annotation, "annotation", annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [leaf for argument in getattr(annotation, "__args__", ()) for leaf in _leaves(argument)]
