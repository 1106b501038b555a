"""A step of several batches moves the weights as the mean of their gradients, taken by hand, does.

Two processes train with every ZeRO stage; the reference is plain torch over whole batches, one after the other.
"""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from f2llm_ray.data.schema import SourceFacts
from f2llm_ray.engine.encode import encode
from f2llm_ray.model.prune import first_layers
from f2llm_ray.model.sizes import Shape, random_backbone
from f2llm_ray.train.loader import TrainBatch
from f2llm_ray.train.objective import StageLoss, Student
from f2llm_ray.train.settings import TrainStage
from f2llm_ray.train.throughput import Flops, positions, seen_pairs
from tests.model.small import FAMILIES, backbone

SHAPE = Shape(hidden=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn=32)
VOCABULARY, ROWS, WORLD = 60, 4, 2
STEPS = (("pairs", "labels", "pairs"), ("pairs", "pairs"))
"""Sources of the batches of each step; the last one has fewer."""
RATE = 1e-2
KINDS: dict[str, dict[str, Any]] = {
    **{f"zero{zero}": {"zero_stage": zero} for zero in (0, 1, 2, 3)},
    "gradcache": {"zero_stage": 2, "tokens_per_chunk": 64},
}
EXITS: dict[str, dict[str, Any]] = {
    **{f"exits-{name}": engine for name, engine in KINDS.items()},
    "exits-checkpointing": {"zero_stage": 3, "gradient_checkpointing": True},
}
"""The same with an exit after the first layer."""
COMPILED: dict[str, dict[str, Any]] = {
    "compiled": {"zero_stage": 2, "compile": True},
    "compiled-checkpointing": {"zero_stage": 1, "compile": True, "gradient_checkpointing": True},
}


SOURCES = {"pairs": SourceFacts("retrieval", ""), "labels": SourceFacts("classification", "")}


def settings_of(engine: dict[str, Any], *, exits: bool = False) -> TrainStage:
    settings: dict[str, Any] = {"global_batch": ROWS, "accumulate": 3, "clip": 1e9}
    settings |= {"elastic": {"layers": [1]}} if exits else {}
    return TrainStage.model_validate(
        {**settings, "engine": {"precision": "fp32", "tokens_per_pass": 256, **engine}}
    )


def batch_of(number: int, source: str, rows: slice) -> TrainBatch:
    """Some rows of a batch, each text its own, of lengths from 2 to 20 tokens."""
    generator = np.random.default_rng(number)
    texts = [
        generator.integers(0, VOCABULARY, generator.integers(2, 20)).astype(np.uint32) for _ in range(3 * ROWS)
    ]
    places = [place for row in range(ROWS)[rows] for place in (3 * row, 3 * row + 1, 3 * row + 2)]
    own = np.arange(len(places)).reshape(-1, 3)
    ids = np.array(places).reshape(-1, 3)
    return TrainBatch(
        step=number,
        source=source,
        tokens=[texts[place] for place in places],
        query=own[:, 0],
        passage=own[:, 1],
        negative=own[:, 2:],
        passage_id=ids[:, 1],
        query_id=ids[:, 0],
    )


def batches(rows: slice) -> list[list[TrainBatch]]:
    numbers = iter(range(100))
    return [[batch_of(next(numbers), source, rows) for source in sources] for sources in STEPS]


def worker(rank: int, folder: str, kinds: dict[str, dict[str, Any]]) -> None:
    import torch.distributed

    from f2llm_ray.train.deepspeed import set_learning_rate, start_engine
    from f2llm_ray.train.model_folder import gathered
    from f2llm_ray.train.step import train_step

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    share = ROWS // WORLD
    found: dict[str, Any] = {}
    for kind, settings in kinds.items():
        stage = settings_of(settings, exits=kind in EXITS)
        backbone = random_backbone(SHAPE, VOCABULARY, seed=0)
        loss, flops = StageLoss(stage, SOURCES, SHAPE.hidden), Flops(backbone)
        if stage.engine.gradient_checkpointing:
            backbone.gradient_checkpointing_enable()
        student = Student(backbone, "last", stage.engine.tokens_per_pass, exits=stage.exits)
        engine = start_engine(student, stage, WORLD)
        engine.train()
        steps = batches(slice(rank * share, (rank + 1) * share))
        coming = chain.from_iterable(steps)
        seen = []
        for step in steps:
            set_learning_rate(engine, RATE)
            seen.append(train_step(engine, loss, coming, len(step), flops=flops, world=WORLD))
        found[kind] = {"seen": seen, "weights": gathered(engine)}
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("step")
    return trained(folder, {**KINDS, **EXITS})


def trained(folder: Path, kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    mp.spawn(worker, args=(str(folder), kinds), nprocs=WORLD)
    found: dict[str, Any] = torch.load(folder / "found.pt", weights_only=False)
    return found


@pytest.fixture(scope="module")
def by_hand() -> dict[str, Any]:
    return taken_by_hand(())


@pytest.fixture(scope="module")
def exits_by_hand() -> dict[str, Any]:
    return taken_by_hand((1,))


def taken_by_hand(exits: tuple[int, ...]) -> dict[str, Any]:
    """The same steps in one process, every batch whole and by itself, and every exit a model of its own."""
    stage = settings_of({})
    loss = StageLoss(stage, SOURCES, SHAPE.hidden)
    backbone = random_backbone(SHAPE, VOCABULARY, seed=0)
    decayed = [p for p in backbone.parameters() if p.ndim > 1]
    plain = [p for p in backbone.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=stage.betas)
    parameters = dict(backbone.named_parameters())
    norms, losses = [], []
    for step in batches(slice(None)):
        gradients = []
        for batch in step:
            values, sums = [], {name: torch.zeros_like(p) for name, p in parameters.items()}
            for model in (backbone, *(first_layers(backbone, layers) for layers in exits)):
                v_nd = encode(model, batch.tokens, pooling="last", tokens_per_pass=4096)
                value = loss(v_nd, batch)[0]
                values.append(value.item())
                own = dict(model.named_parameters())
                for name, gradient in zip(own, torch.autograd.grad(value, list(own.values())), strict=True):
                    sums[name] += gradient
            losses.append(float(np.mean(values)))
            gradients.append({name: total / len(values) for name, total in sums.items()})
        for name, parameter in parameters.items():
            parameter.grad = torch.stack([of_batch[name] for of_batch in gradients]).mean(0)
        of_all = [p.grad for p in parameters.values() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(of_all)))
        optimizer.step()
    weights = {name: value.detach() for name, value in backbone.state_dict().items()}
    return {"norms": norms, "losses": losses, "weights": weights}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_takes_the_mean_of_its_batches_gradients(
    found: dict[str, Any], by_hand: dict[str, Any], kind: str
) -> None:
    equal(found[kind], by_hand)


@pytest.mark.parametrize("kind", EXITS)
def test_with_exits_it_is_the_mean_over_them_too(
    found: dict[str, Any], exits_by_hand: dict[str, Any], kind: str
) -> None:
    equal(found[kind], exits_by_hand)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_layers_learn_the_same(tmp_path: Path, by_hand: dict[str, Any]) -> None:
    for found in trained(tmp_path, COMPILED).values():
        equal(found, by_hand)


def equal(found: dict[str, Any], by_hand: dict[str, Any]) -> None:
    seen, weights = found["seen"], found["weights"]
    assert [done.values["gradient_norm"] for done in seen] == pytest.approx(by_hand["norms"], rel=1e-4)
    assert [batch.loss for done in seen for batch in done.batches] == pytest.approx(by_hand["losses"], rel=1e-4)
    assert [done.values["loss"] for done in seen] == pytest.approx(
        [np.mean(by_hand["losses"][:3]), np.mean(by_hand["losses"][3:])], rel=1e-4
    )
    for name, value in by_hand["weights"].items():
        # Steps of 1e-2; AdamW blows up the last bits of the smallest gradients.
        torch.testing.assert_close(weights[name], value, rtol=0, atol=3e-4)


def test_counts_are_of_both_workers(found: dict[str, Any]) -> None:
    whole = batches(slice(None))
    flops = Flops(random_backbone(SHAPE, VOCABULARY, seed=0))
    for done, step in zip(found["zero2"]["seen"], whole, strict=True):
        assert [batch.source for batch in done.batches] == [batch.source for batch in step]
        assert [batch.tokens for batch in done.batches] == [sum(map(len, batch.tokens)) for batch in step]
        assert [batch.flops for batch in done.batches] == pytest.approx([flops(batch.tokens) for batch in step])
        assert all(batch.positions >= batch.tokens for batch in done.batches)


@pytest.mark.parametrize("kind", ["qwen3 of a shape", *FAMILIES])
def test_flops_are_those_that_torch_counts(kind: str) -> None:
    """All matrix products of a forward and backward pass; attention is counted whole there, and as seen by us."""
    from torch.utils.flop_counter import FlopCounterMode

    model = random_backbone(SHAPE, VOCABULARY, seed=0) if kind == "qwen3 of a shape" else backbone(kind)
    model.set_attn_implementation("eager")
    tokens = [np.arange(40, dtype=np.uint32)]
    with FlopCounterMode(display=False) as counter:
        encode(model, tokens, pooling="mean", tokens_per_pass=64).sum().backward()
    flops = Flops(model)
    seen = flops(tokens) - flops.per_token * 40
    whole = flops.per_pair * sum(flops.windows.values()) * 40 * 40
    # Norm weights and biases are parameters but no matrix products, and the first layer's input needs no gradient.
    assert counter.get_total_flops() == pytest.approx(flops(tokens) - seen + whole, rel=0.06)
    assert 0 < seen <= whole


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4, 10, 100])
def test_pairs_are_those_that_see_each_other(window: int | None, causal: bool) -> None:
    for length in (1, 3, 10, 25):
        behind = np.arange(length)[:, None] - np.arange(length)
        seen = (behind >= 0) if causal else np.ones_like(behind, bool)
        seen &= np.abs(behind) < (window or length)
        expected = seen.sum() - (min(length, window or length) / 2 if causal else 0)
        found = seen_pairs(np.array([length], float), window, causal=causal)
        assert found[0] == pytest.approx(expected)


def test_positions_are_those_the_encoder_computes() -> None:
    backbone = random_backbone(SHAPE, VOCABULARY, seed=0)
    batch = batch_of(0, "pairs", slice(None))
    seen = []
    hook = backbone.embed_tokens.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].numel()))
    for chunks in ([list(range(12))], [[0, 5, 7], [1, 2, 3, 4, 6], [8, 9, 10, 11]]):
        seen.clear()
        for chunk in chunks:
            encode(backbone, [batch.tokens[place] for place in chunk], pooling="last", tokens_per_pass=64)
        assert positions(backbone, batch.tokens, chunks, 64) == sum(seen)
    hook.remove()
