"""GradCache gives the direct loss, gradients and weights, at the memory of one chunk."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_ray.engine.encode import encode, plan_passes
from f2llm_ray.model.sizes import Shape, random_backbone
from f2llm_ray.train.deepspeed import deepspeed_config
from f2llm_ray.train.gradcache import cached_backward, encode_chunks, engine_backward
from f2llm_ray.train.losses import Parts, TextPlaces, contrastive
from f2llm_ray.train.settings import EngineSettings, TrainStage
from tests.train.ranks import on_two_ranks
from tests.train.test_losses import PAPER, ROWS, D, side

N = 4 * ROWS
FEATURES = 7
STEPS = [(0, "direct"), (0, "cached"), (1, "cached"), (2, "cached"), (3, "direct"), (3, "cached")]
"""ZeRO stages, and whether with one chunk or with several."""
SHAPE = Shape(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64)
VOCABULARY = 200
RATE = 1e-3
LossOf = Callable[[torch.Tensor], tuple[torch.Tensor, Parts]]

everyone = list(range(N))
chunkings = st.permutations(everyone).flatmap(
    lambda order: st.lists(st.integers(1, N - 1), unique=True, max_size=N - 1).map(
        lambda cuts: [order[a:b] for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), N], strict=True)]
    )
)


def small_encoder(*, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(FEATURES, 16), torch.nn.Tanh(), torch.nn.Dropout(dropout), torch.nn.Linear(16, D)]
    return torch.nn.Sequential(*layers).double()


def features(seed: int) -> torch.Tensor:
    return torch.randn(N, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(seed: int) -> LossOf:
    places = side(seed)[1]
    return lambda v_nd: contrastive(v_nd, places, PAPER, "retrieval")


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def direct(model: torch.nn.Module, seed: int, chunks: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """One graph over everything; chunks set only the order in which dropout draws."""
    x = features(seed)
    place_n = torch.tensor([place for chunk in chunks for place in chunk])
    v_nd = torch.cat([model(x[list(chunk)]) for chunk in chunks])[torch.argsort(place_n)]
    loss, parts = loss_of(seed)(v_nd)
    loss.backward()
    return {"loss": loss.detach(), "gradient": gradients(model), "hard": parts.by_dim["hard_negative"]}


def cached(model: torch.nn.Module, seed: int, chunks: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    x = features(seed)
    said: list[bool] = []

    def backward(loss: torch.Tensor, last: bool) -> None:
        said.append(last)
        loss.backward()

    loss, parts = cached_backward(lambda chunk: model(x[list(chunk)]), chunks, loss_of(seed), backward)
    assert said == [False] * (len(said) - 1) + [True]
    return {"loss": loss, "gradient": gradients(model), "hard": parts.by_dim["hard_negative"]}


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9, msg=lambda why, n=name: f"{n}: {why}")


@settings(max_examples=15)
@given(chunkings)
def test_any_chunks_give_the_direct_loss_and_gradient(chunks: list[list[int]]) -> None:
    equal(cached(small_encoder(), 1, chunks), direct(small_encoder(), 1, chunks))


@pytest.mark.parametrize("chunks", [[everyone], [[place] for place in everyone]])
def test_one_chunk_and_chunks_of_one_text(chunks: list[list[int]]) -> None:
    equal(cached(small_encoder(), 1, chunks), direct(small_encoder(), 1, chunks))


@settings(max_examples=10)
@given(chunkings)
def test_dropout_drops_the_same_and_draws_as_often(chunks: list[list[int]]) -> None:
    model, other = small_encoder(dropout=0.4), small_encoder(dropout=0.4)
    torch.manual_seed(5)
    expected, after = direct(model, 1, chunks), torch.get_rng_state()
    torch.manual_seed(5)
    equal(cached(other, 1, chunks), expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_holds_the_activations_of_one_chunk() -> None:
    """What autograd keeps at its peak, in bytes, and how often a text is encoded."""
    chunks = [everyone[at : at + 2] for at in range(0, N, 2)]
    model, x = small_encoder(), features(1)
    encoded: list[int] = []

    def forward(chunk: Sequence[int]) -> torch.Tensor:
        encoded.extend(chunk)
        return torch.nn.functional.gelu(model(x[list(chunk)])).tanh()

    def plain_loss(v_nd: torch.Tensor) -> tuple[torch.Tensor, None]:
        return v_nd.square().sum(), None

    whole = Held()
    with whole:
        plain_loss(forward(everyone))[0].backward()
    one = Held()
    with one:
        forward(chunks[0]).sum().backward()
    encoded.clear()
    held = Held()
    with held:
        cached_backward(forward, chunks, plain_loss, lambda loss, _: loss.backward())
    vectors = N * D * 8
    assert held.peak <= one.peak + 3 * vectors < whole.peak
    assert len(encoded) == 2 * N - 2, "the last chunk is encoded once, all others twice"


class Held(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd holds for backward."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        super().__init__(lambda tensor: Kept(self, tensor), lambda kept: kept.tensor)


class Kept:
    def __init__(self, held: Held, tensor: torch.Tensor) -> None:
        self.held, self.tensor = held, tensor
        held.now += tensor.nbytes
        held.peak = max(held.peak, held.now)

    def __del__(self) -> None:
        self.held.now -= self.tensor.nbytes


# Two ranks: one pair of processes for the law in fp64 and for real DeepSpeed engines at every ZeRO stage.


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(_rank, tmp_path_factory.mktemp("ranks"))


def _rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    # The ranks have different numbers of chunks, the first at times a single one.
    plans = [[everyone], [[place] for place in everyone], [everyone[:5], everyone[5:20], everyone[20:]]]
    found: dict[str, Any] = {}
    for number in range(len(plans)):
        chunks = plans[(number + rank) % len(plans)]
        for way in (direct, cached):
            found[f"{way.__name__} {number}"] = way(small_encoder(), rank + 1, chunks)
    for stage, name in STEPS:
        found[f"zero {stage} {name}"] = _engine_step(rank, stage, cache=name == "cached")
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = random_backbone(SHAPE, VOCABULARY, seed=0)

    def forward(self, tokens: list[Any]) -> torch.Tensor:
        return encode(self.backbone, tokens, pooling="last", tokens_per_pass=10**6)


def _texts(rank: int) -> list[Any]:
    generator = np.random.default_rng(rank)
    lengths = generator.integers(3, 30, size=14)
    return [generator.integers(0, VOCABULARY, size=int(length)).astype(np.uint32) for length in lengths]


def _places(rank: int, *, shift: int = 0) -> TextPlaces:
    """Four rows; vectors begin at place `shift`."""
    negative = torch.tensor([[8, 9], [10, -1], [-1, -1], [12, 13]])
    ids = torch.arange(4) + 100 * rank
    return TextPlaces(ids % 100 + shift, ids % 100 + 4 + shift, negative + shift * (negative >= 0), ids + 4, ids)


def _engine_step(rank: int, zero_stage: int, *, cache: bool) -> dict[str, torch.Tensor]:
    """Loss, vectors before and weights after one step of a DeepSpeed engine.

    SGD, since Adam's first step is nearly the same for a gradient twice too large.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as `start_engine`: nothing is compiled
    stage = TrainStage(global_batch=8, clip=1e9, engine=EngineSettings(zero_stage=zero_stage, precision="fp32"))
    config = deepspeed_config(stage, 2)
    # All parameters in parts, as those of a real model; by default none of this size would be.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    module = Encoder()
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    texts, places = _texts(rank), _places(rank)
    chunks = plan_passes([len(text) for text in texts], 40 + 20 * rank) if cache else [list(range(len(texts)))]
    with torch.no_grad():
        v_nd = encode_chunks(lambda chunk: engine([texts[place] for place in chunk]), chunks)
    loss, _ = cached_backward(
        lambda chunk: engine([texts[place] for place in chunk]),
        chunks,
        lambda v_nd: contrastive(v_nd, places, PAPER, "retrieval"),
        engine_backward(engine),
    )
    engine.step()
    parameters = list(module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=zero_stage == 3):
        weights = torch.cat([p.detach().flatten() for p in parameters])
    return {"loss": loss, "chunks": torch.tensor(len(chunks)), "vectors": v_nd, "weights": weights}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(3))
def test_two_ranks_with_unequal_chunks_give_the_direct_gradient(
    number: int, two_ranks: list[dict[str, Any]]
) -> None:
    for rank in two_ranks:
        equal(rank[f"cached {number}"], rank[f"direct {number}"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("zero_stage", "way"), STEPS)
def test_deepspeed_takes_the_step_of_the_global_batch(
    zero_stage: int,
    way: str,
    two_ranks: list[dict[str, Any]],
    plain_step: tuple[torch.Tensor, torch.Tensor, float, torch.Tensor],
) -> None:
    """Weights after a step equal those of plain torch with all rows in one process."""
    expected, loss, norm, vectors = plain_step
    found = [rank[f"zero {zero_stage} {way}"] for rank in two_ranks]
    assert [int(rank["chunks"]) > 1 for rank in found] == [way == "cached"] * 2
    assert found[0]["chunks"] != found[1]["chunks"] or way == "direct"
    torch.testing.assert_close((found[0]["loss"] + found[1]["loss"]) / 2, loss, rtol=1e-6, atol=0)
    for rank in found:
        torch.testing.assert_close(rank["weights"], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat([rank["vectors"] for rank in found]), vectors, rtol=0, atol=1e-5)
    assert norm * RATE > 0.1, "the step is large beside the tolerance"


@pytest.fixture(scope="module")
def plain_step() -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor]:
    """Weights after the step, loss, gradient norm and vectors."""
    module = Encoder()
    v_nd = torch.cat([module(_texts(rank)) for rank in (0, 1)])
    sides = [_places(0), _places(1, shift=14)]
    names = ("query_b", "passage_b", "negative_bk", "passage_id_b", "query_id_b")
    places = TextPlaces(*(torch.cat([getattr(one, name) for one in sides]) for name in names))
    loss, _ = contrastive(v_nd, places, PAPER, "retrieval")
    loss.backward()
    with torch.no_grad():
        weights = torch.cat([(p - RATE * p.grad).flatten() for p in module.parameters() if p.grad is not None])
    return weights, loss.detach(), float(gradients(module).norm()), v_nd.detach()
