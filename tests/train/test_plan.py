"""The plan's arithmetic beside what torch and DeepSpeed really allocate and count."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from f2llm_ray.model.encoder import encode
from f2llm_ray.model.sizes import FAMILY, Shape, non_embedding_parameters, parameters, random_backbone
from f2llm_ray.recipe_file import load_recipe
from f2llm_ray.train import plan
from f2llm_ray.train.settings import TrainStage

REPO = Path(__file__).parent.parent.parent
VOCABULARY, TEXTS, LENGTH = 500, 8, 40
# Every matrix has over 100,000 entries: ZeRO-3 leaves smaller ones whole on every worker, in real models norms.
SHAPE = Shape(hidden=256, layers=2, heads=4, kv_heads=4, head_dim=128, ffn=512)
SHAPES = [SHAPE, Shape(hidden=48, layers=3, heads=6, kv_heads=2, head_dim=32, ffn=80)]
FLOAT_BYTES = {"bf16": 2, "fp32": 4}
ENGINES = [
    *[(precision, zero_stage, False) for precision in ("fp32", "bf16") for zero_stage in (0, 1, 2, 3)],
    ("fp32", 2, True),
    ("bf16", 2, True),
    ("bf16", 3, True),
]


def work_of(shape: Shape = SHAPE, **changes: Any) -> plan.Work:
    """TEXTS texts of LENGTH tokens on each of two workers, in one pass, unless told otherwise."""
    work = plan.Work(
        stage="stage1",
        shape=shape,
        vocabulary=VOCABULARY,
        teacher=None,
        float_bytes=4,
        zero_stage=0,
        offload=False,
        gradient_checkpointing=False,
        world=2,
        rows_per_step=TEXTS,
        texts_per_row=2,
        longest_text_tokens=LENGTH,
        tokens_per_pass=TEXTS * LENGTH,
    )
    return replace(work, **changes)


# Activations.


def saved_bytes(backbone: Any, tokens: list[Any], tokens_per_pass: int) -> int:
    """Bytes of all storages, weights left out, that a forward pass saves for backward."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        vectors = encode(backbone, tokens, tokens_per_pass=tokens_per_pass)
    assert vectors.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


def texts() -> list[Any]:
    return [np.full(LENGTH, text, dtype=np.uint32) for text in range(TEXTS)]


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
        tokens_per_pass=TEXTS * LENGTH // passes,
    )
    planned = plan.activation_bytes(work)
    if checkpointing:  # the layer that backward recomputes is not there yet
        planned -= plan.layer_bytes_per_token(shape, work.float_bytes) * TEXTS * LENGTH // passes
    # The rest are token ids, the rotations of the positions, and the places of the last tokens: 8 bytes a token
    # and a table per pass, against some 300 bytes a token at least.
    assert saved_bytes(backbone, texts(), work.tokens_per_pass) == pytest.approx(planned, rel=0.07)


def test_a_larger_shape_agrees_closer() -> None:
    """What the plan leaves out does not grow with the model."""
    shape = Shape(hidden=320, layers=4, heads=16, kv_heads=8, head_dim=32, ffn=1024)
    backbone = random_backbone(shape, VOCABULARY, seed=0).train()
    assert saved_bytes(backbone, texts(), TEXTS * LENGTH) == pytest.approx(
        plan.activation_bytes(work_of(shape)), rel=0.002
    )


def test_gradients_are_whole_until_the_last_pass_goes_backward() -> None:
    """Why several passes hold all gradients at once, whatever the ZeRO stage."""
    backbone = random_backbone(SHAPES[1], VOCABULARY, seed=0)
    events: list[str] = []
    backbone.layers[-1].register_full_backward_pre_hook(lambda *_: events.append("pass"))
    for parameter in backbone.layers.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: events.append("gradient"))
    encode(backbone, texts(), tokens_per_pass=TEXTS * LENGTH // 4).pow(2).sum().backward()
    assert events.count("pass") == 4
    assert events.count("gradient") == len(list(backbone.layers.parameters()))
    assert "gradient" not in events[: len(events) - events[::-1].index("pass") - 1]
    one, four = (work_of(zero_stage=2, tokens_per_pass=TEXTS * LENGTH // passes) for passes in (1, 4))
    assert plan.gradient_bytes(four) == 2 * plan.gradient_bytes(one), "two workers"


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


def measure(precision: str, zero_stage: int, offload: bool, rank: int) -> dict[str, int]:
    """Bytes that training with an engine holds after backward and after the step, this process's own."""
    from f2llm_ray.train.zero import start_engine

    gc.collect()
    before = set(tensor_bytes())
    engine_settings = {"precision": precision, "zero_stage": zero_stage, "offload": offload}
    stage = TrainStage.model_validate({"global_batch": 2, "engine": engine_settings})
    engine = start_engine(random_backbone(SHAPE, VOCABULARY, seed=0), stage, 2)
    held = {}
    ids = torch.full((1, 5), rank)

    def loss() -> torch.Tensor:
        vectors: torch.Tensor = engine(input_ids=ids, use_cache=False).last_hidden_state
        return vectors.float().pow(2).sum()

    engine.backward(loss())
    engine.step()  # from here on the optimizer has its state
    engine.backward(loss())
    for name, act in (("backward", gc.collect), ("step", engine.step)):
        act()
        sizes = {place: size for place, size in tensor_bytes().items() if place not in before}
        held[name] = sum(sizes.values())
    engine.destroy()
    return held


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
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, bool], dict[str, int]]:
    folder = tmp_path_factory.mktemp("engines")
    code = "import sys; from tests.train.test_plan import worker; worker(int(sys.argv[1]), sys.argv[2])"
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen([*command, str(rank), str(folder)], cwd=REPO) for rank in range(2)]
    assert [process.wait(timeout=250) for process in processes] == [0, 0]
    measured = json.loads((folder / "measured.json").read_text())
    return dict(zip(ENGINES, measured, strict=True))


@pytest.mark.slow  # eleven engines in each of two processes: some 40 s
@pytest.mark.parametrize("engine", ENGINES)
def test_states_are_what_deepspeed_allocates(
    engine: tuple[str, int, bool], engines: dict[tuple[str, int, bool], dict[str, int]]
) -> None:
    precision, zero_stage, offload = engine
    work = work_of(float_bytes=FLOAT_BYTES[precision], zero_stage=zero_stage, offload=offload)
    parts = plan.memory(work)
    held = engines[engine]
    # On a CPU what is offloaded is counted too. The bucket is there in backward only, but for ZeRO-3's.
    bucket = work.float_bytes * plan.BUCKET_PARAMETERS if zero_stage == 3 else 0
    states = parts.weights_bytes + parts.gradients_bytes + parts.optimizer_bytes + plan.host_bytes(work)
    assert held["backward"] - bucket == pytest.approx(states, rel=0.05)
    if zero_stage < 3 and not offload:  # elsewhere the room for gradients stays
        # A tensor whose gradient lies in two workers' shares is kept whole: here 6 % of the parameters.
        assert held["backward"] - held["step"] == pytest.approx(parts.gradients_bytes, rel=0.07)


# FLOPs, hours and what fits.


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_those_that_torch_counts(shape: Shape) -> None:
    backbone = random_backbone(shape, VOCABULARY, seed=0)
    backbone.set_attn_implementation("eager")  # of which torch counts the matrix products
    tokens = TEXTS * LENGTH
    with FlopCounterMode(display=False) as forward:
        vectors = encode(backbone, texts(), tokens_per_pass=tokens)
    with FlopCounterMode(display=False) as backward:
        vectors.sum().backward()
    # Eager attention computes both halves of the scores. Under 1 % is left: our count has norms for matrices.
    matrices = 2 * non_embedding_parameters(shape)
    both_halves = 2 * (plan.forward_flops_per_token(shape, LENGTH) - matrices)
    assert both_halves > 0
    assert forward.get_total_flops() / tokens == pytest.approx(matrices + both_halves, rel=0.01)
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_recomputation_and_a_teacher_are_paid_for() -> None:
    forward = plan.forward_flops_per_token(SHAPE, 100)
    assert plan.flops_per_token(work_of(), 100) == 3 * forward
    assert plan.flops_per_token(work_of(gradient_checkpointing=True), 100) == 4 * forward
    teacher = plan.forward_flops_per_token(SHAPES[1], 100)
    assert plan.flops_per_token(work_of(teacher=SHAPES[1]), 100) == 3 * forward + teacher


def cluster(gpus: int, mfu: float = 0.4) -> plan.Cluster:
    return plan.Cluster(nodes=1, gpus_per_node=gpus, gpu_memory_bytes=80e9, gpu_flops_per_second=1e15, mfu=mfu)


def test_hours_by_hand() -> None:
    texts = plan.Corpus(rows_per_epoch=1e6, tokens_per_row=200.0, measured=True)
    work = work_of(FAMILY["0.6b"])
    flops = 3 * (2 * 440_467_456 + 2 * 28 * 2048 * 100)
    assert plan.hours_per_epoch(work, texts, cluster(1)) == pytest.approx(2e8 * flops / 0.4e15 / 3600)
    one, four = (plan.hours_per_epoch(work, texts, cluster(gpus)) for gpus in (1, 4))
    assert one == pytest.approx(4 * four)
    assert plan.hours_per_epoch(work, replace(texts, rows_per_epoch=None), cluster(1)) is None


@pytest.mark.parametrize("name", ["0.6b", "8b", "14b"])
@pytest.mark.parametrize("gpu_memory_bytes", [24e9, 80e9, 640e9])
def test_the_changes_make_it_fit_and_nothing_is_changed_that_fits(name: str, gpu_memory_bytes: float) -> None:
    recipe = load_recipe("f2llm-v2-data", [f"backbone.path=Qwen/Qwen3-{name.upper()}"])
    work = plan.stage_work(recipe, "stage2", 8)
    changes = plan.changes(work, gpu_memory_bytes)
    if changes is None:
        hardest = replace(work, zero_stage=3, offload=True, world=512, tokens_per_pass=1024)
        assert not plan.fits(hardest, gpu_memory_bytes)
        return
    assert plan.fits(replace(work, **changes), gpu_memory_bytes)
    assert (not changes) == plan.fits(work, gpu_memory_bytes)
    for left_out in changes:
        fewer = {key: value for key, value in changes.items() if key != left_out}
        assert not plan.fits(replace(work, **fewer), gpu_memory_bytes), f"{left_out} was not needed"


def test_shares_of_the_states_shrink_with_the_stage_and_the_world() -> None:
    work = work_of(FAMILY["4b"], float_bytes=2, world=4, rows_per_step=8)
    count = parameters(FAMILY["4b"], VOCABULARY)
    whole, third = plan.memory(work), plan.memory(replace(work, zero_stage=3))
    assert whole.weights_bytes == 2 * count == 4 * third.weights_bytes
    assert whole.gradients_bytes == 2 * count == 4 * third.gradients_bytes
    assert whole.optimizer_bytes == 12 * count == 4 * third.optimizer_bytes


# The job.


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "jobs" / "plan.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_job_prints_numbers_with_units() -> None:
    done = job("--recipe", "f2llm-v2-80m", "--gpus", "4", "--nodes", "2", "--rows", "1000", "--json")
    stages = {stage["stage"]: stage for stage in json.loads(done.stdout)["stages"]}
    assert list(stages) == ["stage1", "stage2", "distilled"]
    assert stages["stage1"]["parameters"] == 596_049_920
    assert stages["distilled"]["parameters"] == 80_084_288
    assert stages["stage1"]["work"]["world"] == 8
    assert stages["stage2"]["work"]["texts_per_row"] == 11, "clustering draws most: 9 negatives"
    assert stages["stage1"]["tokens_per_step"] == 512 * 9 * 1024
    teacher = stages["distilled"]["memory"][0]["teacher_bytes"]
    assert teacher == 4 * 596_049_920, "as the loop loads it: in float32"


def test_the_job_says_what_to_change() -> None:
    done = job("--recipe", "f2llm-v2-14b", "--gpus", "8", "--gpu-memory", "80GB", "--price-per-gpu-hour", "2")
    assert done.returncode == 0, done.stderr
    assert "does not fit; it would with" in done.stdout
    assert "13,990,394,880 parameters" in done.stdout
    assert "at that price" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "backbone.path=someone/else"], ["someone/else", "config.json", "Qwen/Qwen3-0.6B"]),
        (["--gpus", "3"], ["stage1", "global_batch (512)", "3 GPUs"]),
        (["--stage", "stage9"], ["stage9", "stage1", "stage2"]),
        (["--gpu-memory", "many"], ["80GB"]),
        (["--mfu", "0"], ["above 0"]),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: list[str], words: list[str]) -> None:
    done = job("--recipe", "f2llm-v2-0.6b", *arguments)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_a_plan_starts_nothing() -> None:
    code = (
        "import sys; sys.argv = ['plan.py', '--recipe', 'f2llm-v2-4b', '--json']\n"
        "import runpy\n"
        "try: runpy.run_path('jobs/plan.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'ray', 'transformers', 'deepspeed', 'huggingface_hub'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
