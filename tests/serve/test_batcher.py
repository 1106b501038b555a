"""The engine and its batches: a vector depends on its text alone, an answer on its request alone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine.engine import Engine
from f2llm_ray.serve.batcher import Batcher
from tests.tiny import tiny_model

LENGTHS = [1, 2, 3, 5, 5, 8, 13, 13, 21, 34, 55, 64]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def tokens(engine: Engine) -> list[Tokens]:
    generator = np.random.default_rng(0)
    vocabulary = engine.vocabulary
    return [generator.integers(0, vocabulary, length).astype(np.uint32) for length in LENGTHS]


@pytest.fixture(scope="module")
def alone(engine: Engine, tokens: list[Tokens]) -> np.ndarray:
    """The slow reference: transformers' own attention, one text at a time, no padding anywhere."""
    engine.forward.backbone.set_attn_implementation("eager")
    with torch.no_grad():
        rows = [
            engine.forward.backbone(input_ids=torch.from_numpy(text.astype(np.int64))[None]).last_hidden_state[
                0, -1
            ]
            for text in tokens
        ]
    engine.forward.backbone.set_attn_implementation("f2llm_varlen")
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()


@settings(max_examples=40)
@given(places=st.lists(st.integers(0, len(LENGTHS) - 1), min_size=1, max_size=40), budget=st.integers(1, 400))
def test_a_vector_never_depends_on_its_batch(
    engine: Engine, tokens: list[Tokens], alone: np.ndarray, places: list[int], budget: int
) -> None:
    whole, engine.forward.tokens_per_pass = engine.forward.tokens_per_pass, budget
    found = engine.embed_tokens([tokens[place] for place in places])
    engine.forward.tokens_per_pass = whole
    np.testing.assert_allclose(found, alone[places], rtol=0, atol=1e-5)


class Recorder:
    """Stands where the engine does: a text's vector is its first token; a batch waits until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.running = 0
        self.go = threading.Semaphore(0)

    def __call__(self, tokens: Sequence[Tokens]) -> np.ndarray:
        self.running += 1
        assert self.running == 1, "one batch in the engine at a time"
        self.batches.append([int(ids[0]) for ids in tokens])
        self.go.acquire()
        self.running -= 1
        return np.array([[ids[0]] for ids in tokens], dtype=np.float32)


def text(first: int, length: int = 4) -> Tokens:
    return np.array([first] + [0] * (length - 1), dtype=np.uint32)


def test_what_waits_is_joined_up_to_the_budget_in_order_and_what_left_is_dropped() -> None:
    async def run() -> None:
        engine = Recorder()
        batcher = Batcher(engine, batch_tokens=12)
        asked = [asyncio.create_task(batcher.embed([text(0)]))]
        while not engine.batches:
            await asyncio.sleep(0.001)
        asked += [asyncio.create_task(batcher.embed([text(n), text(n + 10)])) for n in (1, 2, 3)]
        asked.append(asyncio.create_task(batcher.embed([text(4)] * 9)))
        gone = asyncio.create_task(batcher.embed([text(99)]))
        probe = asyncio.create_task(batcher.embed([text(7)], first=True))
        await asyncio.sleep(0.01)
        asked[2].cancel()
        gone.cancel()
        await asyncio.sleep(0.01)
        for _ in range(9):
            engine.go.release()
        answers = await asyncio.gather(*asked, probe, return_exceptions=True)
        # The probe goes first, with what fits beside it; what is left of a batch goes to the next in line.
        assert engine.batches == [[0], [7, 1, 11], [3, 13, 4], [4] * 3, [4] * 3, [4] * 2]
        values = [answer[:, 0].tolist() for answer in answers if isinstance(answer, np.ndarray)]
        assert values == [[0], [1, 11], [3, 13], [4] * 9, [7]]
        assert isinstance(answers[2], asyncio.CancelledError)

    asyncio.run(run())


def test_a_large_request_takes_turns_with_those_that_come_after_it() -> None:
    """A short text waits for the batch that runs and for none beyond it, whatever else waits."""

    async def run() -> None:
        engine = Recorder()
        batcher = Batcher(engine, batch_tokens=40)
        large = [asyncio.create_task(batcher.embed([text(n) for _ in range(100)])) for n in (1, 2)]
        while not engine.batches:
            await asyncio.sleep(0.001)
        engine.go.release()
        while len(engine.batches) < 2:
            await asyncio.sleep(0.001)
        short = asyncio.create_task(batcher.embed([text(3)]))
        await asyncio.sleep(0.01)
        large[1].cancel()  # what is left of it is not embedded
        for _ in range(100):
            engine.go.release()
        vectors, one = await asyncio.gather(large[0], short)
        assert vectors[:, 0].tolist() == [1] * 100
        assert one[:, 0].tolist() == [3]
        assert all(len(batch) <= 10 for batch in engine.batches)
        assert {1, 2} <= set(engine.batches[1]), "both large ones go on in one batch"
        assert 3 in engine.batches[2]
        assert all(2 not in batch for batch in engine.batches[2:])

    asyncio.run(run())


@settings(max_examples=30, deadline=None)
@given(
    requests=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=12), min_size=1, max_size=8),
    budget=st.integers(1, 100),
)
def test_every_request_gets_its_own_vectors_whatever_the_budget(requests: list[list[int]], budget: int) -> None:
    def embed(tokens: Sequence[Tokens]) -> np.ndarray:
        assert len(tokens) == 1 or sum(map(len, tokens)) <= budget
        return np.array([[ids[0], len(ids)] for ids in tokens], dtype=np.float32)

    async def run() -> None:
        batcher = Batcher(embed, batch_tokens=budget)
        asked = [[text(100 * n + i, length) for i, length in enumerate(found)] for n, found in enumerate(requests)]
        answers = await asyncio.gather(*(batcher.embed(tokens) for tokens in asked))
        for tokens, answer in zip(asked, answers, strict=True):
            assert answer.tolist() == [[ids[0], len(ids)] for ids in tokens]

    asyncio.run(run())


def test_a_batch_is_what_the_engine_does_in_a_turn() -> None:
    """4,096 tokens a second make batches of 1,024, though 100,000 may be in one."""
    sizes: list[int] = []

    def embed(tokens: Sequence[Tokens]) -> np.ndarray:
        sizes.append(sum(map(len, tokens)))
        time.sleep(sizes[-1] / 8192)
        return np.zeros((len(tokens), 1), dtype=np.float32)

    async def run() -> None:
        batcher = Batcher(embed, batch_tokens=100_000)
        await batcher.embed([text(1, 256)] * 32)

    asyncio.run(run())
    assert sizes[0] == 1024
    assert max(sizes) <= 2048
    assert sum(sizes) == 8192


def test_a_text_that_fails_fails_its_own_request_alone() -> None:
    def fails(tokens: Sequence[Tokens]) -> np.ndarray:
        if any(ids[0] == 13 for ids in tokens):
            raise RuntimeError("out of memory")
        return np.array([[ids[0]] for ids in tokens], dtype=np.float32)

    async def run() -> None:
        batcher = Batcher(fails, batch_tokens=100)
        asked = [batcher.embed([text(n), text(n)]) for n in (1, 13, 2)]
        one, bad, two = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(bad, RuntimeError)
        assert (np.array(one) == 1).all()
        assert (np.array(two) == 2).all()
        assert (await batcher.embed([text(1)])).shape == (1, 1)

    asyncio.run(run())
