"""FLOPs, hours and price of a stage. `Cluster.mfu` covers the waiting for data and for the network."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.model.families import FAMILIES
from f2llm_ray.model.sizes import Shape, is_causal, kind_of, non_embedding_parameters
from f2llm_ray.plan.stage_work import Cluster, CorpusSize, StageWork, corpus_size, stage_work
from f2llm_ray.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a stage takes; a number is None where it needs the number of rows and that is not known."""

    steps: int | None
    """Optimizer steps of the stage."""
    tokens_per_step: float
    flops_per_token: float
    hours_per_epoch: float | None
    hours: float | None
    """Hours of training: of all epochs, of `max_steps`, or of the steps that fit into `max_minutes`."""
    teacher_hours: float | None
    """Hours before it, for the vectors of a cached teacher: at most one for each text that is drawn."""
    price: float | None
    """Price of all GPUs for both, in the currency of the price per GPU-hour."""


def cost(work: StageWork, texts: CorpusSize, cluster: Cluster) -> Cost:
    """Computes what a stage takes on a cluster."""
    text_tokens = texts.tokens_per_row / work.texts_per_row
    tokens_per_step = work.accumulate * work.rows_per_batch * texts.tokens_per_row
    per_token = flops_per_token(work, text_tokens, tokens_per_step / work.accumulate / work.world)
    rate = cluster.world * cluster.gpu_flops_per_second * cluster.mfu * 3600
    steps = optimizer_steps(work, texts, tokens_per_step * per_token / rate)
    hours = None if steps is None else steps * tokens_per_step * per_token / rate
    rows = texts.rows_per_epoch
    vectors = _teacher_tokens(work, texts, steps)
    teacher = None
    if work.teacher is not None and vectors is not None:
        teacher = vectors * forward_flops_per_token(work.teacher.shape, text_tokens) / rate
    price = cluster.price_per_gpu_hour
    return Cost(
        steps=steps,
        tokens_per_step=tokens_per_step,
        flops_per_token=per_token,
        hours_per_epoch=None if rows is None else rows * texts.tokens_per_row * per_token / rate,
        hours=hours,
        teacher_hours=teacher,
        price=None if hours is None or price is None else (hours + (teacher or 0)) * cluster.world * price,
    )


def optimizer_steps(work: StageWork, texts: CorpusSize, hours_per_step: float) -> int | None:
    """Optimizer steps of the stage; None where neither its rows, nor `max_steps`, nor `max_minutes` are known.

    Each source ends an epoch with a batch that is filled up with further rows; this counts one for all sources.
    """
    if work.max_minutes is not None:
        return max(int(work.max_minutes / 60 / hours_per_step), 1)
    if work.max_steps is not None or texts.rows_per_epoch is None:
        return work.max_steps
    return ceil(work.epochs * ceil(texts.rows_per_epoch / work.rows_per_batch) / work.accumulate)


def forward_flops_per_token(shape: Shape, text_tokens: float) -> float:
    """FLOPs of a forward pass per token of texts of this mean length.

    Kaplan et al. 2020 (section 2.1): two per parameter outside the embeddings. Attention adds four per query
    channel and token attended to, and causal attention sees half of them. Texts above the mean length take more;
    sliding windows, where a model has some, are left out.
    """
    per_pair = 2 if is_causal(shape) else 4
    attention = per_pair * shape.layers * shape.heads * shape.head_dim * text_tokens
    return 2 * non_embedding_parameters(shape) + attention


def flops_per_token(work: StageWork, text_tokens: float, worker_tokens: float) -> float:
    """FLOPs of training per token: backward takes twice the forward, a teacher beside the student its own forward.

    Half of a product's backward is its weight's gradient, which frozen weights (LoRA) do not have.

    `worker_tokens` are the mean tokens of a worker's part of a batch, which decide how many chunks it has.
    """
    forwards = 3 + extra_forwards(work, text_tokens, worker_tokens)
    # An exit costs the norm after the last layer once more, and no layer.
    norms = 2 * work.exits * work.shape.hidden if FAMILIES[kind_of(work.shape)].norm is not None else 0
    own = (forward_flops_per_token(work.shape, text_tokens) + norms + 2 * work.adapter_parameters) * forwards
    if work.lora is not None:  # frozen weights have no gradients
        own -= 2 * non_embedding_parameters(work.shape)
    teacher = work.teacher
    return own + (0 if teacher is None or teacher.cached else forward_flops_per_token(teacher.shape, text_tokens))


def extra_forwards(work: StageWork, text_tokens: float, worker_tokens: float) -> float:
    """Forward passes beyond the first: GradCache does all chunks but one again, checkpointing nearly all of each.

    Torch stops recomputing a layer when backward has what it needs, before the last product of its FFN; where a
    norm comes after that (BERT), it takes it too.
    """
    again = 1 - 1 / work.chunks(worker_tokens)
    if not work.gradient_checkpointing:
        return again
    shape = work.shape
    norm_comes_last = FAMILIES[kind_of(shape)].norm is None
    # LoRA adds to the product after it is there, and backward needs what it adds from.
    ffn_out = FAMILIES[kind_of(shape)].ffn_out
    whole = norm_comes_last or any(name.endswith(ffn_out) for name in work.adapted)
    last_products = 0 if whole else 2 * shape.layers * shape.hidden * shape.ffn
    return again + 1 - last_products / (forward_flops_per_token(shape, text_tokens) + 2 * work.adapter_parameters)


def _teacher_tokens(work: StageWork, texts: CorpusSize, steps: int | None) -> float | None:
    """Tokens that a cached teacher encodes, at most: queries and passages once, negatives as often as drawn."""
    if work.teacher is None or not work.teacher.cached or steps is None:
        return None
    drawn = steps * work.accumulate * work.rows_per_batch
    rows = drawn if texts.rows_per_epoch is None else min(drawn, texts.rows_per_epoch)
    text_tokens = texts.tokens_per_row / work.texts_per_row
    return text_tokens * (2 * rows + (work.texts_per_row - 2) * drawn)


def stage_hours(recipe: Recipe, stage: str, cluster: Cluster) -> float | None:
    """Hours that a training stage takes at most, without those of computing a cached teacher's vectors.

    None where they cannot be computed: the recipe trains on CPUs, a model's shape is not known without a download,
    the GPUs cannot share the batch, or a source has no cap.
    """
    if recipe.compute.gpus_per_worker == 0:
        return None
    try:
        work = stage_work(recipe, stage, cluster.world)
    except RecipeError:
        return None
    return cost(work, corpus_size(recipe, work), cluster).hours
