"""The work of a training stage: what a recipe asks of each worker, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.data.schema import Task
from f2llm_ray.model.sizes import Shape, checkpoint_shape
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.train.settings import Distill, TrainStage

FLOAT32_BYTES = 4
DISTILLED = "distilled"


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The model that a distillation learns from."""

    shape: Shape
    vocabulary: int
    cached: bool
    """Its vectors are computed once, ahead of the training; else it runs beside the student."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One stage's work, per worker where it says so."""

    stage: str
    shape: Shape
    vocabulary: int
    teacher: Teacher | None
    float_bytes: int
    """Of a weight in forward and backward: 2 in bf16, 4 in fp32."""
    zero_stage: int
    offload: bool
    gradient_checkpointing: bool
    world: int
    epochs: int
    max_steps: int | None
    rows_per_batch: int
    """Of a global batch."""
    accumulate: int
    """Global batches of an optimizer step."""
    texts_per_row: int
    """Query, passage, and the most negatives that any of its tasks draws."""
    longest_text_tokens: int
    tokens_per_pass: int
    tokens_per_chunk: int | None
    """As in the recipe: None holds the activations of the whole batch."""

    @property
    def most_tokens_per_worker(self) -> int:
        """Tokens of a worker's part of a batch whose texts are all of the longest length."""
        return self.rows_per_batch // self.world * self.texts_per_row * self.longest_text_tokens

    @property
    def chunk_budget(self) -> int | None:
        """GradCache's budget of tokens, None without it; under ZeRO-3 every pass is a chunk of its own."""
        if self.zero_stage == 3:
            return min(self.tokens_per_pass, self.tokens_per_chunk or self.tokens_per_pass)
        return self.tokens_per_chunk

    @property
    def longest_chunk_tokens(self) -> int:
        """Tokens whose activations are held at a time; a text is never cut."""
        return self._longest(self.chunk_budget or self.most_tokens_per_worker, self.most_tokens_per_worker)

    @property
    def longest_pass_tokens(self) -> int:
        """Tokens of the largest forward pass."""
        return self._longest(self.tokens_per_pass, self.longest_chunk_tokens)

    def chunks(self, tokens: float) -> int:
        """Chunks of a worker's part of a batch with this many tokens."""
        return 1 if self.chunk_budget is None else max(ceil(tokens / self.chunk_budget), 1)

    def _longest(self, budget: int, most: int) -> int:
        return min(most, max(budget, self.longest_text_tokens))


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What is trained on."""

    rows_per_epoch: float | None
    """Unknown where a source has no cap and nobody says."""
    rows_given: bool
    """Whether somebody said; else they are the sources' caps."""
    tokens_per_row: float
    """Of a query, its passage and the negatives drawn for it, together."""
    tokens_given: bool
    """Whether somebody said; else they are what texts of the longest length would have."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What trains."""

    nodes: int
    gpus_per_node: int
    gpu_memory_bytes: float
    gpu_flops_per_second: float
    """Peak of dense matrix products in the precision of the training."""
    mfu: float
    """Share of that peak that is reached, by all FLOPs that are done: recomputation and teacher count."""
    price_per_gpu_hour: float | None = None

    @property
    def world(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node


def training_stages(recipe: Recipe) -> list[str]:
    """Names of the stages that train, in order."""
    return [*recipe.stages, *([DISTILLED] if recipe.distill is not None else [])]


def stage_work(recipe: Recipe, name: str, world: int) -> Work:
    """The work of one training stage of a recipe.

    Args:
        recipe: the recipe.
        name: one of its stages, or "distilled".
        world: number of workers.

    Raises:
        RecipeError: the recipe has no such stage, a model's shape or vocabulary is not known, or the workers
            cannot share the batch.
    """
    stage = _settings(recipe, name)
    if stage.global_batch % world:
        raise RecipeError(
            f"stage {name!r}: global_batch ({stage.global_batch}) is not a multiple of the {world} GPUs"
        )
    shape, vocabulary = backbone_shape(recipe)
    teacher = None
    if isinstance(stage, Distill):
        teacher = _teacher(recipe, stage)
        shape, vocabulary = pruned(recipe, shape, vocabulary)
    engine = stage.engine
    tasks = {recipe.sources[source].task for source in recipe.stage_sources(stage)}
    return Work(
        stage=name,
        shape=shape,
        vocabulary=vocabulary,
        teacher=teacher,
        float_bytes=2 if engine.precision == "bf16" else FLOAT32_BYTES,
        zero_stage=engine.zero_stage,
        offload=engine.offload,
        gradient_checkpointing=engine.gradient_checkpointing,
        world=world,
        epochs=stage.epochs,
        max_steps=stage.max_steps,
        rows_per_batch=stage.global_batch,
        accumulate=stage.accumulate,
        texts_per_row=_texts_per_row(stage, tasks),
        longest_text_tokens=recipe.data.max_tokens,
        tokens_per_pass=engine.tokens_per_pass,
        tokens_per_chunk=engine.tokens_per_chunk,
    )


def backbone_shape(recipe: Recipe) -> tuple[Shape, int]:
    """Shape and vocabulary of the model that the recipe starts from.

    Raises:
        RecipeError: not known without a download.
    """
    backbone, tokenizer = recipe.backbone, recipe.tokenizer
    if backbone.path is not None:
        return checkpoint_shape(backbone.path)
    assert backbone.shape is not None  # noqa: S101 - Backbone has one of the two
    if tokenizer.train_vocab is not None:
        return backbone.shape, tokenizer.train_vocab
    # A model made from a shape has as many embeddings as the tokenizer has entries; a checkpoint beside that
    # tokenizer has a few more at most (Qwen3's tables are padded).
    return backbone.shape, checkpoint_shape(str(tokenizer.path))[1]


def pruned(recipe: Recipe, shape: Shape, vocabulary: int) -> tuple[Shape, int]:
    """What the recipe's pruning makes of a shape and a vocabulary.

    Where it keeps the tokens that are used, only the corpus says how many: none are taken off then.
    """
    cut = recipe.prune
    if cut is None:
        return shape, vocabulary
    kept = {part: getattr(cut, part) for part in ("layers", "hidden", "ffn", "kv_heads")}
    changed = {part: number for part, number in kept.items() if number is not None}
    if cut.kv_heads is not None:  # query heads go with the one that they share
        changed["heads"] = shape.heads // shape.kv_heads * cut.kv_heads
    wanted = cut.vocabulary if isinstance(cut.vocabulary, int) else vocabulary
    return shape.model_copy(update=changed), min(vocabulary, wanted)


def _teacher(recipe: Recipe, stage: Distill) -> Teacher | None:
    if not stage.uses_teacher:
        return None
    own = stage.teacher in recipe.model_names()
    shape, vocabulary = backbone_shape(recipe) if own else checkpoint_shape(stage.teacher)
    return Teacher(shape=shape, vocabulary=vocabulary, cached=stage.teacher_vectors == "cached")


def corpus(recipe: Recipe, work: Work, *, rows: int | None, tokens_per_row: float | None) -> Corpus:
    """What is known of a stage's rows; caps and the longest text bound what was not given.

    Args:
        recipe: the recipe.
        work: the stage's work.
        rows: rows of one epoch, where somebody knows.
        tokens_per_row: mean tokens of a row's texts together, where somebody knows.
    """
    sources = [recipe.sources[source] for source in recipe.stage_sources(_settings(recipe, work.stage))]
    capped = [source.cap * source.weight for source in sources if source.cap is not None]
    bound = sum(capped) if len(capped) == len(sources) else None
    most = work.texts_per_row * work.longest_text_tokens
    return Corpus(
        rows_per_epoch=bound if rows is None else rows,
        rows_given=rows is not None,
        tokens_per_row=most if tokens_per_row is None else tokens_per_row,
        tokens_given=tokens_per_row is not None,
    )


def _settings(recipe: Recipe, name: str) -> TrainStage:
    stage = recipe.distill if name == DISTILLED else recipe.stages.get(name)
    if stage is None:
        raise RecipeError(f"stage {name!r}: the recipe trains {training_stages(recipe)}")
    return stage


def _texts_per_row(stage: TrainStage, tasks: set[Task]) -> int:
    return 2 + max(stage.negatives.get(task, 0) for task in tasks)
