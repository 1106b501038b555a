"""A vector depends on its text alone: not on the pass, the order, the neighbours or the padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from f2llm_ray.engine.attention import packs, use_varlen, varlen_attention
from f2llm_ray.engine.encode import FULL_PASS, SHORTEST, encode, plan_packs, plan_passes
from f2llm_ray.model.sizes import Shape, random_backbone

SHAPE = Shape(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=64)


@pytest.fixture(scope="module")
def texts() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(2.5, 1.0, 60).astype(int), 1, 200)
    return [generator.integers(0, 100, length).astype(np.uint32) for length in lengths]


@given(st.lists(st.integers(1, 3000), max_size=200), st.integers(64, 20_000))
def test_passes_hold_each_text_once_within_the_budget(lengths: list[int], budget: int) -> None:
    passes = plan_passes(lengths, budget)
    assert sorted(index for indices in passes for index in indices) == list(range(len(lengths)))
    for indices in passes:
        longest = max(lengths[index] for index in indices)
        assert len(indices) == 1 or len(indices) * longest <= budget
        last_full = next((n for n in range(len(indices)) if n * longest >= FULL_PASS), None)
        if last_full is not None:
            assert all(lengths[index] >= SHORTEST * longest for index in indices[last_full:])


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(64, 500))
def test_packs_hold_each_text_once_longest_first_within_the_budget(lengths: list[int], budget: int) -> None:
    packs = plan_packs(lengths, budget)
    order = [index for pack in packs for index in pack]
    assert order == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    assert all(len(pack) == 1 or sum(lengths[index] for index in pack) <= budget for pack in packs)


def test_packed_bucketed_padded_and_single_give_the_same_vectors_and_gradients(texts: list[np.ndarray]) -> None:
    backbone = random_backbone(SHAPE, 100, seed=0).double()
    target = torch.randn(len(texts), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for budget, packed in ((64, False), (1000, False), (10**9, False), (1000, True), (10**9, True)):
        if packed:
            use_varlen(backbone)
        assert packs(backbone) is packed
        backbone.zero_grad()
        vectors = encode(backbone, texts, pooling="last", tokens_per_pass=budget)
        (vectors * target).sum().backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in backbone.parameters()])
        results.append((vectors.detach(), gradients.clone()))
    alone = random_backbone(SHAPE, 100, seed=0).double()
    single = torch.stack([_last_hidden(alone, text) for text in texts])
    for vectors, gradients in results:
        torch.testing.assert_close(vectors, single, rtol=0, atol=1e-10)
        torch.testing.assert_close(gradients, results[0][1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
def test_a_sliding_window_is_the_same_packed_and_alone(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 30, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2))
    starts = torch.tensor([0, 7, 8, 30], dtype=torch.int32)
    module = torch.nn.Identity()
    module.is_causal = causal
    found, _ = varlen_attention(module, q, k, v, None, scaling=0.3, starts_n1=starts, longest=22, sliding_window=4)
    for first, last in ((0, 7), (7, 8), (8, 30)):
        for place in range(first, last):
            seen = slice(max(first, place - 3), place + 1 if causal else min(last, place + 4))
            for head in range(4):
                scores = (k[0, head // 2, seen] @ q[0, head, place]) * 0.3
                expected = torch.softmax(scores, 0) @ v[0, head // 2, seen]
                torch.testing.assert_close(found[0, place, head], expected)


def test_order_and_neighbours_do_not_matter(texts: list[np.ndarray]) -> None:
    backbone = random_backbone(SHAPE, 100, seed=0).eval()
    order = np.random.default_rng(1).permutation(len(texts))
    with torch.no_grad():
        whole = encode(backbone, texts, pooling="last", tokens_per_pass=512)
        shuffled = encode(backbone, [texts[index] for index in order], pooling="last", tokens_per_pass=512)
    torch.testing.assert_close(shuffled, whole[torch.from_numpy(order)], rtol=0, atol=1e-5)


def test_no_texts_give_no_vectors() -> None:
    assert encode(random_backbone(SHAPE, 100, seed=0), [], pooling="last", tokens_per_pass=64).shape == (0, 32)


@torch.no_grad()
def _last_hidden(backbone: torch.nn.Module, text: np.ndarray) -> torch.Tensor:
    """The slow reference: one text alone, no padding anywhere."""
    return backbone(input_ids=torch.from_numpy(text.astype(np.int64))[None]).last_hidden_state[0, -1]
