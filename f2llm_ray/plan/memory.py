"""Bytes on a GPU and on its host, and which settings to change where a stage does not fit.

The bytes are as DeepSpeed 0.19 and transformers 5 were seen to allocate them; tests/plan/ counts them again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from f2llm_ray.model.families import FAMILIES
from f2llm_ray.model.sizes import Shape, kind_of, parameters
from f2llm_ray.plan.cost import extra_forwards
from f2llm_ray.plan.stage_work import FLOAT32_BYTES, StageWork

BFLOAT16_BYTES = 2
ADAM_BYTES = 8
"""Two float32 moments per parameter."""
BUCKET_PARAMETERS = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default `stage3_max_live_parameters`: what ZeRO-3 keeps gathered at a time, at most."""

SAVED_BY_ENCODERS = {"bert": (8, 2), "xlm-roberta": (8, 2), "modernbert": (10, 4)}
"""Numbers that a layer saves per token: so many times the hidden size, and so many times the FFN's channels."""

USABLE = 0.9
"""Share of a GPU's memory that a plan may fill; the rest is for CUDA's context and libraries, the gradients of the
activations of one layer, and the allocator's fragmentation."""
WORLD = "world"
"""Name of the number of GPUs among the changes; the others are settings of the engine."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU at the end of the forward pass and in the backward pass, when most is held."""

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    buffers_bytes: float
    """From ZeRO-1 on DeepSpeed's bucket of gradients on their way, and the weights that ZeRO-3 has gathered."""
    activations_bytes: float
    teacher_bytes: float

    @property
    def total_bytes(self) -> float:
        """All parts."""
        return float(sum(asdict(self).values()))


def memory(work: StageWork) -> Memory:
    """Bytes on one GPU for the batch of the longest texts."""
    count = parameters(work.shape, work.vocabulary) + work.adapter_parameters
    bucket = BUCKET_PARAMETERS if work.zero_stage else 0
    gathered = min(LIVE_PARAMETERS, count) if work.zero_stage == 3 else 0
    return Memory(
        weights_bytes=work.float_bytes * (count / work.world if work.zero_stage == 3 else count),
        gradients_bytes=gradient_bytes(work),
        optimizer_bytes=0 if work.offload else optimizer_bytes(work),
        buffers_bytes=work.float_bytes * (bucket + gathered),
        activations_bytes=activation_bytes(work),
        teacher_bytes=teacher_bytes(work),
    )


def gradient_bytes(work: StageWork) -> float:
    """Most bytes that gradients take in a backward pass.

    From ZeRO-2 on DeepSpeed keeps a worker's share alone, on the host with offload, since each gradient is reduced
    as soon as it is there; under ZeRO-1 too where a step has one backward pass. But it is there only when all
    forward passes that used its weight have gone backward: where a chunk takes more than one pass, autograd holds
    the sums of all gradients meanwhile, whatever the stage.
    """
    several_forward = work.longest_pass_tokens < work.longest_chunk_tokens
    if work.zero_stage == 0 or several_forward or (work.zero_stage == 1 and _several_backward(work)):
        return work.float_bytes * _trained(work)
    return 0 if work.offload else work.float_bytes * _trained(work) / work.world


def optimizer_bytes(work: StageWork) -> float:
    """AdamW's state for one worker: two float32 moments, and a float32 copy of the weights.

    Rajbhandari et al. 2020 (ZeRO, section 3.1): 12 bytes a parameter, of which a worker holds its share from
    ZeRO-1 on. DeepSpeed makes the copy in fp32 too, though not without ZeRO, where AdamW works on the weights.
    """
    copies = work.zero_stage > 0 or work.float_bytes != FLOAT32_BYTES
    per_parameter = ADAM_BYTES + (FLOAT32_BYTES if copies else 0)
    return per_parameter * _trained(work) / (work.world if work.zero_stage else 1)


def host_bytes(work: StageWork) -> float:
    """Bytes of host memory per worker with the optimizer offloaded: its state, and gradients as they come and go.

    DeepSpeed keeps them there in float32 and in the precision of the pass, and under ZeRO-2 their sums over the
    backward passes of a step once more.
    """
    if not work.offload:
        return 0
    sums = work.float_bytes if work.zero_stage == 2 and _several_backward(work) else 0
    return optimizer_bytes(work) + (FLOAT32_BYTES + work.float_bytes + sums) * _trained(work) / work.world


def teacher_bytes(work: StageWork) -> float:
    """The weights of a teacher beside the student, in bf16 on any GPU; cached vectors come with the batch."""
    if work.teacher is None or work.teacher.cached:
        return 0
    return BFLOAT16_BYTES * parameters(work.teacher.shape, work.teacher.vocabulary)


def activation_bytes(work: StageWork) -> float:
    """What forward saves for backward: of a worker's whole part of a batch, or with GradCache of one chunk.

    The loss is over all texts of a batch, so that without GradCache (Gao et al. 2021) all its passes are held
    together. With checkpointing (Chen et al. 2016) a layer saves its input only, and one layer of one pass is
    whole at a time.
    """
    shape, tokens = work.shape, work.longest_chunk_tokens
    ends = ends_bytes_per_token(shape, work.float_bytes)
    if kind_of(shape) not in SAVED_BY_ENCODERS:  # of a LayerNorm, its input is held by the next layer anyway
        ends += work.exits * ends  # each exit goes through the last norm once more
    layer = layer_bytes_per_token(shape, work.float_bytes) + adapter_bytes_per_token(work) / shape.layers
    if not work.gradient_checkpointing:
        return tokens * (shape.layers * layer + ends)
    inputs = shape.layers * work.float_bytes * shape.hidden
    return tokens * (inputs + ends) + work.longest_pass_tokens * layer


def layer_bytes_per_token(shape: Shape, float_bytes: int) -> int:
    """Bytes that one layer saves for backward, read off transformers' code and seen to the byte.

    An RMSNorm saves its input in float32, the normalised input (in Gemma in float32), and its scale. The
    projections save the norm's output once, attention (flash or fused) its queries, keys, values, output and a
    number per head, a gated FFN the gate, its activation, the other branch and their product. A LayerNorm saves
    its input and two numbers, in the precision of the pass. Korthikanti et al. 2022 count a GPT's likewise.
    """
    kind, family, heads = kind_of(shape), FAMILIES[kind_of(shape)], FLOAT32_BYTES * shape.heads
    if kind in SAVED_BY_ENCODERS:
        of_hidden, of_ffn = SAVED_BY_ENCODERS[kind]
        return float_bytes * (of_hidden * shape.hidden + of_ffn * shape.ffn + 4) + heads
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = float_bytes * (2 * queries + 2 * keys) + heads
    normed_bytes = FLOAT32_BYTES if family.norm_adds_one else float_bytes
    norms = sum(name.endswith("layernorm.weight") for name in family.layer)
    layer_norms = norms * ((FLOAT32_BYTES + normed_bytes) * shape.hidden + FLOAT32_BYTES)
    layer_norms += 2 * float_bytes * shape.hidden  # what two of them give, as the projections' input
    head_norms = (FLOAT32_BYTES + normed_bytes) * (queries + keys) + FLOAT32_BYTES * (shape.heads + shape.kv_heads)
    has_head_norms = "self_attn.q_norm.weight" in family.layer
    return layer_norms + (head_norms if has_head_norms else 0) + attention + 4 * float_bytes * shape.ffn


def adapter_bytes_per_token(work: StageWork) -> int:
    """Bytes that LoRA's matrices save: what A gives; a frozen weight's input, which A reads, is counted anyway.

    So the plan is an upper bound: a frozen norm, and a weight that is no target, save less than trained ones.
    """
    return 0 if work.lora is None else work.float_bytes * work.lora.rank * len(work.adapted)


def ends_bytes_per_token(shape: Shape, float_bytes: int) -> int:
    """Bytes that are saved outside the layers: by the last norm, or that of BERT's embeddings."""
    kind = kind_of(shape)
    if kind in SAVED_BY_ENCODERS:
        return float_bytes * shape.hidden
    normed_bytes = FLOAT32_BYTES if FAMILIES[kind].norm_adds_one else float_bytes
    return (FLOAT32_BYTES + normed_bytes) * shape.hidden + FLOAT32_BYTES


def _several_backward(work: StageWork) -> bool:
    """Whether an optimizer step takes more than one backward pass."""
    return work.accumulate > 1 or work.chunks(work.most_tokens_per_worker) > 1


def _trained(work: StageWork) -> int:
    """Parameters that have gradients and moments."""
    return work.adapter_parameters or parameters(work.shape, work.vocabulary)


def fits(work: StageWork, gpu_memory_bytes: float) -> bool:
    """Whether the work fits into the usable part of a GPU."""
    return memory(work).total_bytes <= USABLE * gpu_memory_bytes


def variants(work: StageWork) -> Iterator[StageWork]:
    """The same work at each ZeRO stage, without and with offload where DeepSpeed has it.

    Without ZeRO there is no bf16 (see `Recipe`).
    """
    for zero_stage in (0, 1, 2, 3) if work.float_bytes == FLOAT32_BYTES else (1, 2, 3):
        for offload in (False, True) if zero_stage else (False,):
            yield replace(work, zero_stage=zero_stage, offload=offload)


def changes(work: StageWork, gpu_memory_bytes: float) -> dict[str, Any] | None:
    """The settings to change so that the work fits; empty where it fits already, None where no change helps.

    Of all changes that fit, it takes the cheapest, which avoid in this order: more GPUs; offload; ZeRO-3, which
    fetches weights for every pass; chunks smaller than a pass, since gradients are reduced for each; more forward
    passes (checkpointing and GradCache take about one each); small chunks; a high ZeRO stage.
    """
    worlds = [world for power in range(12) if not work.rows_per_batch % (world := work.world << power)]
    choices = product(
        worlds,
        sorted({work.offload, True}),
        sorted({work.zero_stage, *range(max(work.zero_stage, 2), 4)}),
        _chunks(work),
        sorted({work.gradient_checkpointing, True}),
    )
    names = (WORLD, "offload", "zero_stage", "tokens_per_chunk", "gradient_checkpointing")
    changed = (replace(work, **dict(zip(names, choice, strict=True))) for choice in choices)
    fitting = [each for each in changed if (each.zero_stage or not each.offload) and fits(each, gpu_memory_bytes)]
    if not fitting:
        return None
    best = min(fitting, key=_expense)
    return {name: getattr(best, name) for name in names if getattr(best, name) != getattr(work, name)}


def _expense(work: StageWork) -> tuple[float, ...]:
    again = extra_forwards(work, work.longest_text_tokens, work.most_tokens_per_worker)
    chunk = work.tokens_per_chunk or math.inf
    small = chunk < work.tokens_per_pass
    return (work.world, work.offload, work.zero_stage == 3, small, again, -chunk, work.zero_stage)


def _chunks(work: StageWork) -> list[int | None]:
    """The present chunk size, then that of a pass and its halvings, down to the longest text."""
    halvings = [work.tokens_per_pass >> power for power in range(work.tokens_per_pass.bit_length())]
    least = max(work.longest_text_tokens, 64)  # the recipe takes no fewer
    now = work.tokens_per_chunk
    return [now, *(chunk for chunk in halvings if chunk >= least and (now is None or chunk < now))]
