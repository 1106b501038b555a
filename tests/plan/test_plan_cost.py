"""FLOPs beside torch's count, hours and money by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from f2llm_ray.engine.encode import encode, plan_passes
from f2llm_ray.model.families import family_of
from f2llm_ray.model.sizes import FAMILY, Shape, checkpoint_shape, non_embedding_parameters, random_backbone
from f2llm_ray.plan.cost import Cost, cost, flops_per_token, forward_flops_per_token
from f2llm_ray.plan.stage_work import Cluster, CorpusSize, TeacherWork
from f2llm_ray.train.gradcache import cached_backward
from f2llm_ray.train.lora import add_adapters
from f2llm_ray.train.settings import Lora
from f2llm_ray.train.throughput import Flops
from tests.model.small import FAMILIES, backbone
from tests.plan.works import LENGTH, SHAPE, SHAPES, TEXTS, TOKENS, VOCABULARY, texts, work_of

ROWS = CorpusSize(rows_per_epoch=1e6, rows_given=True, tokens_per_row=200.0, tokens_given=True)


def eager(shape: Shape) -> Any:
    """A model with the attention of which torch counts the matrix products."""
    backbone = random_backbone(shape, VOCABULARY, seed=0)
    backbone.set_attn_implementation("eager")
    return backbone


def test_exits_cost_norms_and_no_layers() -> None:
    one, three = (flops_per_token(work_of(exits=exits), 40, TOKENS) for exits in (1, 3))
    plain = flops_per_token(work_of(), 40, TOKENS)
    assert three - plain == pytest.approx(3 * (one - plain)) == pytest.approx(3 * 3 * 2 * SHAPE.hidden)
    assert three / plain < 1.01


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_those_that_torch_counts(shape: Shape) -> None:
    backbone = eager(shape)
    with FlopCounterMode(display=False) as forward:
        vectors = encode(backbone, texts(), pooling="last", tokens_per_pass=TOKENS)
    with FlopCounterMode(display=False) as backward:
        vectors.sum().backward()
    # Eager attention computes both halves of the scores. Under 1 % is left: our count has norms for matrices.
    matrices = 2 * non_embedding_parameters(shape)
    both_halves = 2 * (forward_flops_per_token(shape, LENGTH) - matrices)
    assert both_halves > 0
    assert forward.get_total_flops() / TOKENS == pytest.approx(matrices + both_halves, rel=0.01)
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


@pytest.mark.parametrize("chunks", [1, 2, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_recomputation_costs_what_torch_counts(chunks: int, checkpointing: bool) -> None:
    """Of a whole training step with GradCache, in forward passes."""
    backbone = eager(SHAPES[1]).train()
    if checkpointing:
        backbone.gradient_checkpointing_enable()
    budget = TOKENS // chunks
    with FlopCounterMode(display=False) as forward:
        encode(backbone, texts(), pooling="last", tokens_per_pass=TOKENS)
    with FlopCounterMode(display=False) as step:
        cached_backward(
            lambda some: encode(
                backbone, [texts()[place] for place in some], pooling="last", tokens_per_pass=budget
            ),
            plan_passes([LENGTH] * TEXTS, budget),
            lambda v_nd: (v_nd.pow(2).sum(), None),
            lambda loss, _: loss.backward(),
        )
    work = work_of(SHAPES[1], tokens_per_chunk=budget, gradient_checkpointing=checkpointing)
    # Twice the length, since eager attention computes both halves of the scores.
    planned = flops_per_token(work, 2 * LENGTH, TOKENS) / forward_flops_per_token(SHAPES[1], 2 * LENGTH)
    assert (planned == 3 + 1 - 1 / chunks) != checkpointing
    assert step.get_total_flops() / forward.get_total_flops() == pytest.approx(planned, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_of_lora_are_those_that_torch_counts(checkpointing: bool) -> None:
    shape, lora = SHAPES[1], Lora(rank=4)
    model = eager(shape).train()
    add_adapters(model, lora, 0, "here")
    if checkpointing:
        model.gradient_checkpointing_enable()
    with FlopCounterMode(display=False) as counter:
        encode(model, texts(), pooling="last", tokens_per_pass=TOKENS).sum().backward()
    work = work_of(shape, lora=lora, gradient_checkpointing=checkpointing)
    # Twice the length, since eager attention computes both halves of the scores.
    planned = flops_per_token(work, 2 * LENGTH, TOKENS)
    # What the first layer's queries, keys and values are of needs no gradient; with checkpointing transformers
    # asks for it all the same.
    read = shape.hidden * (shape.heads + 2 * shape.kv_heads) * shape.head_dim + 3 * lora.rank * shape.hidden
    expected = planned if checkpointing else planned - 2 * read
    assert counter.get_total_flops() / TOKENS == pytest.approx(expected, rel=0.01)


def test_only_a_teacher_beside_the_student_costs_every_epoch() -> None:
    student, teacher = (forward_flops_per_token(shape, 100) for shape in SHAPES)
    beside, cached = (
        work_of(teacher=TeacherWork(shape=SHAPES[1], vocabulary=VOCABULARY, cached=cached))
        for cached in (False, True)
    )
    assert flops_per_token(beside, 100, TOKENS) == 3 * student + teacher
    assert flops_per_token(cached, 100, TOKENS) == 3 * student
    assert hours(work_of()).teacher_hours is hours(beside).teacher_hours is None
    two = replace(cached, epochs=2, texts_per_row=4)
    # Query and passage of a million rows once, two negatives of each in both epochs: 50 tokens a text.
    expected = 50 * (2 + 2 * 2) * 1e6 * forward_flops_per_token(SHAPES[1], 50) / 0.4e15 / 3600
    assert hours(two).teacher_hours == pytest.approx(expected)
    assert hours(two).hours == hours(replace(two, teacher=None)).hours


def cluster(gpus: int = 1, **changes: Any) -> Cluster:
    settings = {"nodes": 1, "gpu_memory_bytes": 80e9, "gpu_flops_per_second": 1e15, "mfu": 0.4}
    return Cluster(gpus_per_node=gpus, **{**settings, **changes})


def hours(work: Any, texts: CorpusSize = ROWS, **changes: Any) -> Cost:
    return cost(work, texts, cluster(**changes))


def test_hours_by_hand() -> None:
    work = work_of(FAMILY["0.6b"], epochs=2)
    flops = 3 * (2 * 440_467_456 + 2 * 28 * 2048 * 100)
    found = hours(work)
    assert found.hours_per_epoch == pytest.approx(2e8 * flops / 0.4e15 / 3600)
    assert found.hours == pytest.approx(2 * found.hours_per_epoch)
    assert found.steps == 2 * 1e6 / TEXTS
    assert found.tokens_per_step == TEXTS * 200
    assert hours(work, gpus=4).hours == pytest.approx(found.hours / 4)
    assert hours(work, nodes=2, gpus=2).hours == pytest.approx(found.hours / 4)
    four = hours(work, gpus=4, price_per_gpu_hour=2.5)
    assert four.price == pytest.approx(found.hours * 2.5), "more GPUs for fewer hours cost the same"


def test_batches_to_a_step_change_the_steps_and_not_the_hours() -> None:
    one, four = (hours(work_of(accumulate=accumulate)) for accumulate in (1, 4))
    assert one.steps == 4 * four.steps
    assert four.tokens_per_step == 4 * one.tokens_per_step
    assert four.hours == pytest.approx(one.hours)


def test_without_rows_only_max_steps_says_how_long() -> None:
    unknown = replace(ROWS, rows_per_epoch=None)
    found = hours(work_of(), unknown, price_per_gpu_hour=1)
    assert found.steps is found.hours is found.hours_per_epoch is found.price is None
    some = hours(work_of(max_steps=10), unknown)
    assert (some.steps, some.hours_per_epoch) == (10, None)
    assert some.hours == pytest.approx(10 * some.tokens_per_step * some.flops_per_token / 0.4e15 / 3600)
    assert hours(work_of(max_steps=10)).hours == some.hours
    assert hours(work_of(max_steps=10**9)).steps == 10**9


def test_a_cached_teacher_may_read_fewer_rows_than_there_are() -> None:
    teacher = TeacherWork(shape=SHAPE, vocabulary=VOCABULARY, cached=True)
    whole, short = (hours(work_of(teacher=teacher, max_steps=steps)) for steps in (None, 1000))
    assert short.teacher_hours == pytest.approx(whole.teacher_hours * 1000 * TEXTS / 1e6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_plan_and_the_meters_count_the_same_flops(kind: str, tmp_path: Path) -> None:
    """For texts of one length, where no layer slides."""
    model = backbone(kind)
    model.config.save_pretrained(tmp_path)
    shape, _ = checkpoint_shape(str(tmp_path))
    length = 3  # within the windows
    tokens = [np.arange(length, dtype=np.uint32)]
    counted = Flops(model)(tokens)
    assert 3 * length * forward_flops_per_token(shape, length) == pytest.approx(counted)
    for lora in (Lora(rank=4), Lora(rank=2, targets=tuple(family_of(model.config).linear)[-1:])):
        model = backbone(kind)
        add_adapters(model, lora, 0, "here")
        work = work_of(shape, lora=lora)
        trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
        assert work.adapter_parameters == trained
        assert length * flops_per_token(work, length, TOKENS) == pytest.approx(Flops(model)(tokens))
