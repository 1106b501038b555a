"""What a training stage will take: bytes on a GPU, FLOPs, hours, and what to change where it does not fit.

Arithmetic alone: nothing is started, downloaded or allocated. Units are in the names; tokens are real ones, not
padding, and FLOPs count a multiplication and an addition as two. The bytes are those that DeepSpeed 0.19 and
transformers 5 were seen to allocate; tests/train/test_plan.py counts them again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from f2llm_ray.errors import RecipeError
from f2llm_ray.model.sizes import Shape, checkpoint_shape, non_embedding_parameters, parameters
from f2llm_ray.recipe import Recipe
from f2llm_ray.train.settings import Distill, TrainStage

FLOAT32_BYTES = 4
ADAM_BYTES = 8
"""Two float32 moments per parameter."""
BUCKET_PARAMETERS = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default `stage3_max_live_parameters`: what ZeRO-3 keeps gathered at a time, at most."""
USABLE = 0.9
"""Share of a GPU's memory that a plan may fill; the rest is for CUDA's context and libraries, the gradients of the
activations of one layer, and what the allocator loses between blocks."""


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

    @property
    def world(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What is trained on."""

    rows_per_epoch: float | None
    """Unknown where a source has no cap and nobody says."""
    tokens_per_row: float
    """Of a query, its passage and the negatives drawn for it, together."""
    measured: bool
    """Whether `tokens_per_row` was given; else it is what texts of the longest length would have."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One stage's work, per worker where it says so."""

    stage: str
    shape: Shape
    vocabulary: int
    teacher: Shape | None
    """The online teacher's shape; it has the student's vocabulary."""
    float_bytes: int
    """Of a weight in forward and backward: 2 in bf16, 4 in fp32."""
    zero_stage: int
    offload: bool
    gradient_checkpointing: bool
    world: int
    rows_per_step: int
    """Of the global batch."""
    texts_per_row: int
    """Query, passage, and the most negatives that any of its tasks draws."""
    longest_text_tokens: int
    tokens_per_pass: int

    @property
    def most_tokens_per_worker(self) -> int:
        """Tokens of a worker's part of a batch whose texts are all of the longest length."""
        return self.rows_per_step // self.world * self.texts_per_row * self.longest_text_tokens

    @property
    def longest_pass_tokens(self) -> int:
        """Tokens of the largest forward pass; a text is never cut."""
        return min(self.most_tokens_per_worker, max(self.tokens_per_pass, self.longest_text_tokens))


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU at the end of the forward pass and in the backward pass, when most is held."""

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    buffers_bytes: float
    """DeepSpeed's bucket of gradients on their way, and the weights that ZeRO-3 has gathered."""
    activations_bytes: float
    teacher_bytes: float

    @property
    def total_bytes(self) -> float:
        """All parts."""
        return float(sum(asdict(self).values()))


def stage_work(recipe: Recipe, name: str, world: int) -> Work:
    """The work of one training stage of a recipe.

    Args:
        recipe: the recipe.
        name: one of its stages, or "distilled".
        world: number of workers.

    Raises:
        RecipeError: the backbone's shape or vocabulary is not known, or the workers cannot share the batch.
    """
    stage = recipe.distill if name == "distilled" else recipe.stages.get(name)
    if stage is None:
        raise RecipeError(f"stage {name!r}: the recipe trains {training_stages(recipe)}")
    if stage.global_batch % world:
        raise RecipeError(
            f"stage {name!r}: global_batch ({stage.global_batch}) is not a multiple of the {world} GPUs"
        )
    shape, vocabulary = backbone_shape(recipe)
    teacher = None
    if isinstance(stage, Distill) and recipe.prune is not None:
        teacher = shape
        cut = {"layers": recipe.prune.layers, "hidden": recipe.prune.hidden, "ffn": recipe.prune.ffn}
        shape = shape.model_copy(update=cut)
    tasks = {recipe.sources[source].task for source in recipe.stage_sources(stage)}
    return Work(
        stage=name,
        shape=shape,
        vocabulary=vocabulary,
        teacher=teacher,
        float_bytes=2 if stage.engine.precision == "bf16" else FLOAT32_BYTES,
        zero_stage=stage.engine.zero_stage,
        offload=stage.engine.offload,
        gradient_checkpointing=stage.engine.gradient_checkpointing,
        world=world,
        rows_per_step=stage.global_batch,
        texts_per_row=_texts_per_row(stage, tasks),
        longest_text_tokens=recipe.data.max_tokens,
        tokens_per_pass=stage.engine.tokens_per_pass,
    )


def training_stages(recipe: Recipe) -> list[str]:
    """Names of the stages that train, in order."""
    return [*recipe.stages, *(["distilled"] if recipe.distill is not None else [])]


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


def _texts_per_row(stage: TrainStage, tasks: set[Any]) -> int:
    return 2 + max(stage.negatives.get(task, 0) for task in tasks)


def corpus(recipe: Recipe, work: Work, *, rows: int | None, tokens_per_row: float | None) -> Corpus:
    """What is known of a stage's rows; caps and the longest text bound what was not given.

    Args:
        recipe: the recipe.
        work: the stage's work.
        rows: rows of one epoch, where somebody knows.
        tokens_per_row: mean tokens of a row's texts together, where somebody knows.
    """
    stage = recipe.distill if work.stage == "distilled" else recipe.stages[work.stage]
    assert stage is not None  # noqa: S101 - `work` was made from it
    sources = [recipe.sources[source] for source in recipe.stage_sources(stage)]
    capped = [source.cap * source.weight for source in sources if source.cap is not None]
    bound = sum(capped) if len(capped) == len(sources) else None
    most = work.texts_per_row * work.longest_text_tokens
    return Corpus(
        rows_per_epoch=bound if rows is None else rows,
        tokens_per_row=most if tokens_per_row is None else tokens_per_row,
        measured=tokens_per_row is not None,
    )


# Memory.


def memory(work: Work) -> Memory:
    """Bytes on one GPU for the batch of the longest texts."""
    count = parameters(work.shape, work.vocabulary)
    share = count / work.world
    held = share if work.zero_stage == 3 else count
    return Memory(
        weights_bytes=work.float_bytes * held,
        gradients_bytes=gradient_bytes(work),
        optimizer_bytes=0 if work.offload else optimizer_bytes(work),
        buffers_bytes=buffer_bytes(work),
        activations_bytes=activation_bytes(work),
        teacher_bytes=0 if work.teacher is None else FLOAT32_BYTES * parameters(work.teacher, work.vocabulary),
    )


def gradient_bytes(work: Work) -> float:
    """The largest that gradients get in a backward pass.

    From ZeRO-1 on DeepSpeed keeps a worker's share alone, on the host with offload, since steps are not
    accumulated and each gradient is reduced as soon as it is there. But it is there only when all forward passes
    that used its weight have gone backward: with more than one pass autograd holds the sums of all gradients
    meanwhile, whatever the stage.
    """
    count = parameters(work.shape, work.vocabulary)
    if work.zero_stage == 0 or work.longest_pass_tokens < work.most_tokens_per_worker:
        return work.float_bytes * count
    return 0 if work.offload else work.float_bytes * count / work.world


def optimizer_bytes(work: Work) -> float:
    """AdamW's state for one worker: two float32 moments, and a float32 copy of the weights.

    Rajbhandari et al. 2020 (ZeRO, section 3.1): 12 bytes a parameter, of which a worker holds its share from
    ZeRO-1 on. DeepSpeed makes the copy in fp32 too, though not without ZeRO, where AdamW works on the weights.
    """
    copies = work.zero_stage > 0 or work.float_bytes != FLOAT32_BYTES
    per_parameter = ADAM_BYTES + (FLOAT32_BYTES if copies else 0)
    return per_parameter * parameters(work.shape, work.vocabulary) / (work.world if work.zero_stage else 1)


def host_bytes(work: Work) -> float:
    """Bytes of host memory per worker with the optimizer offloaded: its state, and gradients as they come and go.

    DeepSpeed keeps them there in float32 and in the precision of the pass.
    """
    share = parameters(work.shape, work.vocabulary) / work.world
    return optimizer_bytes(work) + (FLOAT32_BYTES + work.float_bytes) * share if work.offload else 0


def buffer_bytes(work: Work) -> float:
    """DeepSpeed's own: the gradient bucket from ZeRO-1 on, and under ZeRO-3 the gathered weights."""
    count = parameters(work.shape, work.vocabulary)
    bucket = BUCKET_PARAMETERS if work.zero_stage else 0
    live = min(LIVE_PARAMETERS, count) if work.zero_stage == 3 else 0
    return work.float_bytes * (bucket + live)


def activation_bytes(work: Work) -> float:
    """What the forward pass of a worker's whole batch leaves for the backward pass.

    A worker's loss is over all its texts, so that the passes of one step are held together. With checkpointing
    (Chen et al. 2016) a layer leaves its input only, and one layer of one pass is whole at a time.
    """
    shape, tokens = work.shape, work.most_tokens_per_worker
    ends = final_bytes_per_token(shape, work.float_bytes)
    layer = layer_bytes_per_token(shape, work.float_bytes)
    if not work.gradient_checkpointing:
        return tokens * (shape.layers * layer + ends)
    inputs = shape.layers * work.float_bytes * shape.hidden
    return tokens * (inputs + ends) + work.longest_pass_tokens * layer


def layer_bytes_per_token(shape: Shape, float_bytes: int) -> int:
    """Bytes that one Qwen3 layer saves for backward, read off transformers' code and seen to the byte.

    A norm saves its input in float32, the normalised input, and its scale. The projections save the norm's
    output once, attention (flash or fused) its queries, keys, values, output and a number per head, the FFN
    gate, its activation, the other branch and their product. Korthikanti et al. 2022 count a GPT's likewise.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer_norms = 2 * ((FLOAT32_BYTES + 2 * float_bytes) * shape.hidden + FLOAT32_BYTES)
    head_norms = (FLOAT32_BYTES + float_bytes) * (queries + keys) + FLOAT32_BYTES * (shape.heads + shape.kv_heads)
    attention = float_bytes * (2 * queries + 2 * keys) + FLOAT32_BYTES * shape.heads
    return layer_norms + head_norms + attention + 4 * float_bytes * shape.ffn


def final_bytes_per_token(shape: Shape, float_bytes: int) -> int:
    """Bytes that the last norm saves: its input in float32, the normalised input, its scale."""
    return (FLOAT32_BYTES + float_bytes) * shape.hidden + FLOAT32_BYTES


# Time.


def forward_flops_per_token(shape: Shape, text_tokens: float) -> float:
    """FLOPs of a forward pass per token of texts of this mean length.

    Kaplan et al. 2020 (section 2.1): two per parameter outside the embeddings. Attention adds four per query
    channel and token looked at, of which a causal one sees half. Long texts take more than the mean says.
    """
    attention = 2 * shape.layers * shape.heads * shape.head_dim * text_tokens
    return 2 * non_embedding_parameters(shape) + attention


def flops_per_token(work: Work, text_tokens: float) -> float:
    """FLOPs of training per token: backward takes twice the forward, checkpointing and a teacher one more each."""
    own = forward_flops_per_token(work.shape, text_tokens) * (4 if work.gradient_checkpointing else 3)
    return own + (0 if work.teacher is None else forward_flops_per_token(work.teacher, text_tokens))


def hours_per_epoch(work: Work, texts: Corpus, cluster: Cluster) -> float | None:
    """Hours of one epoch, waiting for data or for the network not counted; None without the number of rows."""
    if texts.rows_per_epoch is None:
        return None
    flops = flops_per_token(work, texts.tokens_per_row / work.texts_per_row)
    rate = cluster.world * cluster.gpu_flops_per_second * cluster.mfu
    return texts.rows_per_epoch * texts.tokens_per_row * flops / rate / 3600


# What fits.


def variants(work: Work) -> Iterator[Work]:
    """The same work at each ZeRO stage, and with offload where DeepSpeed has it."""
    for zero_stage in (0, 1, 2, 3):
        for offload in (False, True) if zero_stage else (False,):
            yield replace(work, zero_stage=zero_stage, offload=offload)


def fits(work: Work, gpu_memory_bytes: float) -> bool:
    """Whether the work fits into the usable part of a GPU."""
    return memory(work).total_bytes <= USABLE * gpu_memory_bytes


def changes(work: Work, gpu_memory_bytes: float) -> dict[str, Any] | None:
    """The settings to change for the work to fit; empty if it does, None if none help.

    Tried in this order, each with all that comes before it: a higher ZeRO stage, gradient checkpointing, smaller
    passes, offload, twice the GPUs (a worker's part of the batch is smaller then, and its share of the states).
    """
    worlds = [world for power in range(12) if not work.rows_per_step % (world := work.world << power)]
    choices = product(
        worlds,
        sorted({work.offload, True}),
        _smaller(work.tokens_per_pass, work.longest_text_tokens),
        sorted({work.gradient_checkpointing, True}),
        sorted({work.zero_stage, *range(max(work.zero_stage, 2), 4)}),
    )
    for world, offload, tokens_per_pass, checkpointing, zero_stage in choices:
        changed = replace(
            work,
            world=world,
            offload=offload,
            tokens_per_pass=tokens_per_pass,
            gradient_checkpointing=checkpointing,
            zero_stage=zero_stage,
        )
        if (zero_stage or not offload) and fits(changed, gpu_memory_bytes):
            return _difference(work, changed)
    return None


def _smaller(tokens_per_pass: int, least: int) -> list[int]:
    halvings = int(math.log2(max(tokens_per_pass / least, 1)))
    return [tokens_per_pass >> power for power in range(halvings + 1)]


def _difference(old: Work, new: Work) -> dict[str, Any]:
    names = ("zero_stage", "gradient_checkpointing", "tokens_per_pass", "offload", "world")
    return {name: getattr(new, name) for name in names if getattr(new, name) != getattr(old, name)}
