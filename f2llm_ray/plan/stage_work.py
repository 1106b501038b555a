"""The work of a training stage: shapes, batches and engine of a recipe's stage, as numbers per worker."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from f2llm_ray.base.errors import RecipeError, RunError
from f2llm_ray.model.families import Part
from f2llm_ray.model.sizes import Shape, checkpoint_shape, family_of_shape
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.train.lora import adapted, adapter_parameters
from f2llm_ray.train.settings import Distill, Lora, TrainStage

FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class TeacherWork:
    """The teacher of a distillation."""

    shape: Shape
    vocabulary: int
    cached: bool
    """Whether its vectors are computed once, before the training; else it runs beside the student."""


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """The work of one stage."""

    stage: str
    shape: Shape
    vocabulary: int
    teacher: TeacherWork | None
    float_bytes: int
    """Bytes of a weight in forward and backward: 2 in bf16, 4 in fp32."""
    zero_stage: int
    offload: bool
    gradient_checkpointing: bool
    world: int
    epochs: int
    max_steps: int | None
    max_minutes: float | None = None
    """How long the stage may take, in place of both."""
    rows_per_batch: int
    """Rows of a global batch, over all workers."""
    accumulate: int
    """Global batches of an optimizer step."""
    texts_per_row: int
    """Query, passage, and the most negatives that any of its tasks draws."""
    longest_text_tokens: int
    tokens_per_pass: int
    tokens_per_chunk: int | None
    """As in the recipe; where it is None, the activations of the whole batch are held together."""
    exits: int = 0
    """Exits before the last layer that are trained too (`elastic`)."""
    lora: Lora | None = None

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

    @property
    def adapter_parameters(self) -> int:
        """Parameters of LoRA's matrices, 0 without them."""
        return 0 if self.lora is None else adapter_parameters(self.lora, self.shape, self._place)

    @property
    def adapted(self) -> list[str]:
        """The names of the modules that LoRA adapts."""
        if self.lora is None:
            return []
        return list(adapted(self.lora, family_of_shape(self.shape), self.shape.layers, self._place))

    @property
    def _place(self) -> str:
        return f"stage {self.stage!r}"

    def _longest(self, budget: int, most: int) -> int:
        return min(most, max(budget, self.longest_text_tokens))


@dataclass(frozen=True, kw_only=True)
class CorpusSize:
    """How much a stage trains on."""

    rows_per_epoch: float | None
    """None where it was not given and a source has no cap."""
    rows_given: bool
    """Whether the rows were given; else they are the sources' caps."""
    tokens_per_row: float
    """Mean tokens of a query, its passage and the negatives drawn for it, together."""
    tokens_given: bool
    """Whether the tokens were given; else they are those of texts of the longest length."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The GPUs that train. The defaults are those of an H100."""

    nodes: int = 1
    gpus_per_node: int
    gpu_memory_bytes: float = 80e9
    gpu_flops_per_second: float = 989e12
    """Peak of dense matrix products in the precision of the training."""
    mfu: float = 0.4
    """Model FLOPs utilization: the share of that peak that is reached, with recomputation and teacher counted."""
    price_per_gpu_hour: float | None = None

    @property
    def world(self) -> int:
        """Number of GPUs."""
        return self.nodes * self.gpus_per_node


def training_stages(recipe: Recipe) -> list[str]:
    """Names of the stages that train, in order."""
    return [name for name, step in recipe.steps().items() if isinstance(step, TrainStage)]


def stage_work(recipe: Recipe, name: str, world: int) -> StageWork:
    """The work of one training stage of a recipe with `world` workers.

    Raises:
        RecipeError: the recipe has no such stage, a model's shape or vocabulary is not known, the workers cannot
            share the batch, or a target of LoRA names nothing in the model.
    """
    stage = _settings(recipe, name)
    if stage.global_batch % world:
        raise RecipeError(
            f"stage {name!r}: global_batch ({stage.global_batch}) is not a multiple of the {world} GPUs"
        )
    shape, vocabulary = shape_of(recipe, name)
    teacher = None
    if isinstance(stage, Distill) and stage.uses_teacher and stage.teaches_by_model:
        cached = stage.teacher_vectors == "cached"
        teacher_shape, teacher_vocabulary = shape_of(recipe, stage.teacher)
        teacher = TeacherWork(shape=teacher_shape, vocabulary=teacher_vocabulary, cached=cached)
    engine = stage.engine
    tasks = {recipe.sources[source].task for source in recipe.stage_sources(stage)}
    work = StageWork(
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
        max_minutes=stage.max_minutes,
        rows_per_batch=stage.global_batch,
        accumulate=stage.accumulate,
        texts_per_row=2 + max(stage.negatives.get(task, 0) for task in tasks),
        longest_text_tokens=recipe.data.max_tokens,
        tokens_per_pass=engine.tokens_per_pass,
        tokens_per_chunk=engine.tokens_per_chunk,
        exits=len(stage.exits),
        lora=stage.lora,
    )
    try:
        _ = work.adapted
    except RunError as error:
        raise RecipeError(str(error)) from None
    return work


def shape_of(recipe: Recipe, model: str) -> tuple[Shape, int]:
    """Shape and vocabulary of a model, read without a download.

    A pruning that keeps the tokens in use leaves the vocabulary as it is here: only the corpus says how many they
    are.

    The model is the name of one of the recipe's, or the path of a model folder, which has a /.

    Raises:
        RecipeError: the shape is not known without a download.
    """
    if "/" in model:
        return checkpoint_shape(model)
    shape, vocabulary = _backbone_shape(recipe)
    for cut in recipe.prunes_of(model):
        parts: tuple[Part, ...] = ("layers", "hidden", "ffn", "kv_heads")
        kept = {part: cut.count(part) for part in parts}
        changed: dict[str, int] = {part: number for part, number in kept.items() if number is not None}
        if cut.kv_heads is not None:  # the query heads that share one go with it
            changed["heads"] = shape.heads // shape.kv_heads * cut.kv_heads
        shape = shape.model_copy(update=changed)
        vocabulary = min(vocabulary, cut.vocabulary) if isinstance(cut.vocabulary, int) else vocabulary
    return shape, vocabulary


def _backbone_shape(recipe: Recipe) -> tuple[Shape, int]:
    backbone, tokenizer = recipe.backbone, recipe.tokenizer
    if backbone.path is not None:
        return checkpoint_shape(backbone.path)
    assert backbone.shape is not None  # noqa: S101 - Backbone has one of the two
    if tokenizer.train_vocab is not None:
        return backbone.shape, tokenizer.train_vocab
    # A model made from a shape has one embedding per entry of the tokenizer. The checkpoint beside that tokenizer
    # has a few more, since Qwen3's tables are padded.
    return backbone.shape, checkpoint_shape(str(tokenizer.path))[1]


def corpus_size(
    recipe: Recipe, work: StageWork, *, rows: int | None = None, tokens_per_row: float | None = None
) -> CorpusSize:
    """How much a stage trains on: rows of one epoch, and mean tokens of a row's texts together.

    What is not given is bounded by the sources' caps and the longest text.
    """
    sources = [recipe.sources[source] for source in recipe.stage_sources(_settings(recipe, work.stage))]
    capped = [source.cap * source.weight for source in sources if source.cap is not None]
    bound = sum(capped) if len(capped) == len(sources) else None
    most = work.texts_per_row * work.longest_text_tokens
    return CorpusSize(
        rows_per_epoch=bound if rows is None else rows,
        rows_given=rows is not None,
        tokens_per_row=most if tokens_per_row is None else tokens_per_row,
        tokens_given=tokens_per_row is not None,
    )


def _settings(recipe: Recipe, name: str) -> TrainStage:
    stage = recipe.steps().get(name)
    if not isinstance(stage, TrainStage):
        raise RecipeError(f"stage {name!r}: the recipe trains {training_stages(recipe)}")
    return stage
