"""The plan's bytes beside what torch and DeepSpeed really allocate."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from f2llm_ray.engine.encode import encode, plan_passes
from f2llm_ray.model.families import without_dropout
from f2llm_ray.model.sizes import FAMILY, Shape, checkpoint_shape, parameters, random_backbone
from f2llm_ray.plan.memory import (
    BUCKET_PARAMETERS,
    activation_bytes,
    gradient_bytes,
    host_bytes,
    layer_bytes_per_token,
    memory,
)
from f2llm_ray.plan.stage_work import TeacherWork
from f2llm_ray.train.gradcache import cached_backward, engine_backward
from f2llm_ray.train.lora import add_adapters
from f2llm_ray.train.settings import Lora, TrainStage
from tests.model.small import FAMILIES, TWO_WAY_GEMMA, backbone
from tests.plan.works import LENGTH, SHAPE, SHAPES, TEXTS, TOKENS, VOCABULARY, texts, work_of

REPO = Path(__file__).parent.parent.parent
FLOAT_BYTES = {"bf16": 2, "fp32": 4}
ENGINES = [
    *[(precision, zero_stage, False, 1) for precision in ("fp32", "bf16") for zero_stage in (0, 1, 2, 3)],
    *[("fp32", zero_stage, False, 3) for zero_stage in (0, 1, 2)],
    *[("bf16", zero_stage, False, 3) for zero_stage in (1, 2, 3)],
    *[("bf16", zero_stage, True, chunks) for zero_stage in (2, 3) for chunks in (1, 3)],
    ("fp32", 2, True, 1),
]
"""Precision, ZeRO stage, offload, chunks of a step."""


# Activations.


class Saved:
    """Bytes of the storages that autograd holds for backward, weights left out: now, and at the most."""

    def __init__(self, backbone: Any) -> None:
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
        self.holders: Counter[int] = Counter()
        self.now = self.most = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        saved = self

        class Held:
            def __init__(self, tensor: torch.Tensor) -> None:
                storage = tensor.untyped_storage()
                # Detached: an output that holds its own graph would never be let go.
                self.tensor, self.place, self.size = tensor.detach(), storage.data_ptr(), storage.nbytes()
                self.counted = self.place not in saved.weights
                saved.holders[self.place] += 1
                if self.counted and saved.holders[self.place] == 1:
                    saved.now += self.size
                    saved.most = max(saved.most, saved.now)

            def __del__(self) -> None:
                saved.holders[self.place] -= 1
                if self.counted and saved.holders[self.place] == 0:
                    saved.now -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            yield


@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_what_a_forward_pass_saves(
    shape: Shape, dtype: torch.dtype, checkpointing: bool, passes: int
) -> None:
    backbone = random_backbone(shape, VOCABULARY, seed=0).to(dtype).train()
    if checkpointing:
        backbone.gradient_checkpointing_enable()
    work = work_of(
        shape,
        float_bytes=dtype.itemsize,
        gradient_checkpointing=checkpointing,
        tokens_per_pass=TOKENS // passes,
    )
    planned = activation_bytes(work)
    if checkpointing:  # the layer that backward recomputes is not there yet
        planned -= layer_bytes_per_token(shape, work.float_bytes) * TOKENS // passes
    saved = Saved(backbone)
    with saved.watched():
        vectors = encode(backbone, texts(), pooling="last", tokens_per_pass=work.tokens_per_pass)
    assert vectors.requires_grad
    # The rest are token ids, the rotations of the positions, and the places of the last tokens: 8 bytes a token
    # and a table per pass, against some 300 bytes a token at least.
    assert saved.now == saved.most == pytest.approx(planned, rel=0.07)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != TWO_WAY_GEMMA])  # masked on CPU alone
def test_activations_of_every_family(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = without_dropout(backbone(kind)).to(dtype).train()
    if getattr(model.config, "layer_types", None):  # a window's mask is a matter of the CPU
        model.config.layer_types = ["full_attention"] * 3
        model = type(model)(model.config).to(dtype).train()
    model.config.save_pretrained(tmp_path)
    shape, _ = checkpoint_shape(str(tmp_path))
    saved = Saved(model)
    with saved.watched():
        vectors = encode(model, texts(), pooling="last", tokens_per_pass=TOKENS)
    assert vectors.requires_grad
    planned = activation_bytes(work_of(shape, float_bytes=dtype.itemsize))
    before = saved.now
    # Each exit goes through the last norm once more; in float32 that keeps no second copy of its input.
    with saved.watched():
        exits = encode(model, texts(), pooling="last", tokens_per_pass=TOKENS, exits=(1, 2))
    more = activation_bytes(work_of(shape, float_bytes=dtype.itemsize, exits=2)) - planned
    assert exits.requires_grad
    assert 0.3 * more - 16 * TOKENS <= saved.now - 2 * before <= more + 64 * TOKENS
    del exits
    # The rest are ids, positions and places: at most some 50 bytes a token, against 1,000 and more.
    assert planned <= saved.now <= planned + 64 * TOKENS


def test_a_larger_shape_agrees_closer() -> None:
    """What the plan leaves out does not grow with the model."""
    shape = Shape(hidden=320, layers=4, heads=16, kv_heads=8, head_dim=32, ffn=1024)
    backbone = random_backbone(shape, VOCABULARY, seed=0).train()
    saved = Saved(backbone)
    with saved.watched():
        vectors = encode(backbone, texts(), pooling="last", tokens_per_pass=TOKENS)
    assert saved.now == pytest.approx(activation_bytes(work_of(shape)), rel=0.002)
    del vectors
    assert saved.now == 0, "the measure sees what is let go"


@pytest.mark.parametrize(("chunks", "passes"), [(1, 1), (2, 1), (4, 1), (2, 2), (8, 1)])
def test_gradcache_holds_the_activations_of_one_chunk(chunks: int, passes: int) -> None:
    """From the first chunk to the end of the backward pass, however many chunks there are."""
    shape = Shape(hidden=96, layers=3, heads=6, kv_heads=2, head_dim=32, ffn=256)
    backbone = random_backbone(shape, VOCABULARY, seed=0).train()
    budget = TOKENS // chunks
    work = work_of(shape, tokens_per_chunk=budget, tokens_per_pass=budget // passes)
    found = plan_passes([LENGTH] * TEXTS, budget)
    assert len(found) == chunks == work.chunks(TOKENS)
    saved = Saved(backbone)
    with saved.watched():
        cached_backward(
            lambda some: encode(
                backbone, [texts()[place] for place in some], pooling="last", tokens_per_pass=budget // passes
            ),
            found,
            lambda v_nd: (v_nd.pow(2).sum(), None),
            lambda loss, _: loss.backward(),
        )
    assert saved.most == pytest.approx(activation_bytes(work), rel=0.03)
    assert activation_bytes(work) * chunks == activation_bytes(work_of(shape))
    assert saved.now == 0


def test_zero_3_takes_every_pass_as_a_chunk() -> None:
    """As objective.chunks_of does, so that all ranks fetch weights equally often."""
    work = work_of(zero_stage=3, tokens_per_pass=TOKENS // 4)
    assert (work.longest_chunk_tokens, work.chunks(TOKENS)) == (TOKENS // 4, 4)
    assert activation_bytes(work) == activation_bytes(work_of()) / 4
    assert replace(work, tokens_per_chunk=TOKENS).longest_chunk_tokens == TOKENS // 4
    assert replace(work, tokens_per_chunk=TOKENS // 8).longest_chunk_tokens == LENGTH == TOKENS // 8
    assert replace(work, tokens_per_chunk=LENGTH // 2).longest_chunk_tokens == LENGTH, "a text is never cut"


def test_gradients_are_whole_until_the_last_pass_goes_backward() -> None:
    """Why several passes of a chunk hold all gradients at once, whatever the ZeRO stage."""
    backbone = random_backbone(SHAPES[1], VOCABULARY, seed=0)
    events: list[str] = []
    backbone.layers[-1].register_full_backward_pre_hook(lambda *_: events.append("pass"))
    for parameter in backbone.layers.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: events.append("gradient"))
    encode(backbone, texts(), pooling="last", tokens_per_pass=TOKENS // 4).pow(2).sum().backward()
    assert events.count("pass") == 4
    assert events.count("gradient") == len(list(backbone.layers.parameters()))
    assert "gradient" not in events[: len(events) - events[::-1].index("pass") - 1]
    one, four = (work_of(zero_stage=2, tokens_per_pass=TOKENS // passes) for passes in (1, 4))
    assert gradient_bytes(four) == 2 * gradient_bytes(one), "two workers"
    assert gradient_bytes(replace(four, tokens_per_chunk=TOKENS // 4)) == gradient_bytes(one)


# The engine.


def tensor_bytes() -> dict[int, int]:
    """Bytes of each storage that some tensor, or its gradient, holds."""
    storages: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for found in gc.get_objects():
            if issubclass(type(found), torch.Tensor) and found.device.type == "cpu":
                for tensor in (found, found.grad):
                    if tensor is not None:
                        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return storages


def measure(precision: str, zero_stage: int, offload: bool, chunks: int, rank: int) -> dict[str, int]:
    """Bytes that an engine holds in this process after each backward pass and after the step."""
    from f2llm_ray.train.deepspeed import start_engine

    gc.collect()
    before = set(tensor_bytes())
    engine_settings = {"precision": precision, "zero_stage": zero_stage, "offload": offload}
    stage = TrainStage.model_validate({"global_batch": 2, "engine": engine_settings})
    engine = start_engine(random_backbone(SHAPE, VOCABULARY, seed=0), stage, 2)
    backward = engine_backward(engine)
    ids = torch.full((1, 5), rank)

    def held() -> int:
        gc.collect()
        return sum(size for place, size in tensor_bytes().items() if place not in before)

    def chunk(last: bool) -> int:
        backward(engine(input_ids=ids, use_cache=False).last_hidden_state.float().pow(2).sum(), last)
        return held()

    for number in range(chunks):
        chunk(number == chunks - 1)
    engine.step()  # from here on the optimizer has its state
    sizes = [chunk(number == chunks - 1) for number in range(chunks)]
    engine.step()
    found = {"backward": sizes, "step": held()}
    engine.destroy()
    return found


def worker(rank: int, folder: str) -> None:
    """One of two processes that measure every engine."""
    import torch.distributed

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    measured = [measure(*engine, rank) for engine in ENGINES]
    if rank == 0:
        (Path(folder) / "measured.json").write_text(json.dumps(measured))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, bool, int], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("engines")
    code = "import sys; from tests.plan.test_plan_memory import worker; worker(int(sys.argv[1]), sys.argv[2])"
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen([*command, str(rank), str(folder)], cwd=REPO) for rank in range(2)]
    assert [process.wait(timeout=550) for process in processes] == [0, 0]
    measured = json.loads((folder / "measured.json").read_text())
    return dict(zip(ENGINES, measured, strict=True))


@pytest.mark.slow  # nineteen engines in each of two processes: a minute or two
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ENGINES)
def test_states_are_what_deepspeed_allocates(
    engine: tuple[str, int, bool, int], engines: dict[tuple[str, int, bool, int], dict[str, Any]]
) -> None:
    precision, zero_stage, offload, chunks = engine
    work = work_of(
        float_bytes=FLOAT_BYTES[precision],
        zero_stage=zero_stage,
        offload=offload,
        tokens_per_pass=TOKENS // chunks,
        tokens_per_chunk=TOKENS // chunks,
    )
    parts = memory(work)
    held = engines[engine]
    states = parts.weights_bytes + parts.gradients_bytes + parts.optimizer_bytes + host_bytes(work)
    # On a CPU what is offloaded is counted too. DeepSpeed's bucket is there within backward, and stays after it
    # under ZeRO-3, and under ZeRO-1 between the backward passes of a step, whose last one leaves a share.
    bucket = work.float_bytes * BUCKET_PARAMETERS
    stays = zero_stage == 3 or (zero_stage == 1 and chunks > 1)
    assert held["backward"][0] - bucket * stays == pytest.approx(states, rel=0.05)
    assert max(held["backward"]) <= 1.001 * held["backward"][0]
    if zero_stage in {0, 2} and not offload:  # elsewhere the room for gradients stays, or a bucket beside it
        # A tensor whose gradient lies in two workers' shares is kept whole: here 6 % of the parameters.
        assert held["backward"][-1] - held["step"] == pytest.approx(parts.gradients_bytes, rel=0.07)


def test_shares_of_the_states_shrink_with_the_stage_and_the_world() -> None:
    work = work_of(FAMILY["4b"], float_bytes=2, world=4, rows_per_batch=8)
    count = parameters(FAMILY["4b"], VOCABULARY)
    whole, third = memory(work), memory(replace(work, zero_stage=3))
    assert whole.weights_bytes == 2 * count == 4 * third.weights_bytes
    assert whole.gradients_bytes == 2 * count == 4 * third.gradients_bytes
    assert whole.optimizer_bytes == 12 * count == 4 * third.optimizer_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_saves_no_more_than_planned(dtype: torch.dtype) -> None:
    """Frozen norms save less than trained ones, which the plan leaves out."""
    model, lora = random_backbone(SHAPE, VOCABULARY, seed=0), Lora(rank=16)
    add_adapters(model, lora, 0, "here")
    saved = Saved(model.to(dtype).train())
    with saved.watched():
        vectors = encode(model, texts(), pooling="last", tokens_per_pass=TOKENS)
    assert vectors.requires_grad
    planned = activation_bytes(work_of(SHAPE, float_bytes=dtype.itemsize, lora=lora))
    assert 0.6 * planned < saved.now < 1.02 * planned


def test_lora_has_gradients_and_moments_of_its_matrices_alone() -> None:
    plain = work_of(FAMILY["4b"], float_bytes=2, world=4, rows_per_batch=8, zero_stage=2)
    work = replace(plain, lora=Lora(rank=16))
    count, whole = work.adapter_parameters, parameters(FAMILY["4b"], VOCABULARY)
    # Of each layer: queries, keys, values, output; gate, up and down of the FFN.
    inputs = 3 * 2560 + 32 * 128 + 2 * 2560 + 9728
    outputs = (32 + 2 * 8) * 128 + 2560 + 2 * 9728 + 2560
    assert count == 36 * 16 * (inputs + outputs) < 0.01 * whole * 1.5
    for zero_stage, share in ((1, 1), (2, 4), (3, 4)):
        parts = memory(replace(work, zero_stage=zero_stage, accumulate=2))
        assert parts.gradients_bytes == 2 * count / share
        assert parts.optimizer_bytes == 12 * count / 4
        assert parts.weights_bytes == 2 * (whole + count) / (4 if zero_stage == 3 else 1)
    assert host_bytes(replace(work, offload=True)) < 0.02 * host_bytes(replace(plain, offload=True))


def test_only_a_teacher_beside_the_student_takes_memory() -> None:
    beside, cached = (
        work_of(teacher=TeacherWork(shape=SHAPE, vocabulary=VOCABULARY, cached=cached)) for cached in (False, True)
    )
    assert memory(beside).teacher_bytes == 2 * parameters(SHAPE, VOCABULARY)
    assert memory(cached).teacher_bytes == 0
