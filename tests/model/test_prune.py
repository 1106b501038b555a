"""Pruning is masking: the small model computes what the parent would with the removed parts at zero."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from f2llm_ray.errors import RecipeError
from f2llm_ray.model.encoder import encode
from f2llm_ray.model.importance import Importance, measure
from f2llm_ray.model.prune import Kept, choose, prune
from f2llm_ray.model.sizes import Shape, count_parameters, non_embedding_parameters, random_backbone

SHAPE = Shape(hidden=32, layers=3, heads=4, kv_heads=2, head_dim=8, ffn=48)


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Module:
    model = random_backbone(SHAPE, 60, seed=0).eval()
    with torch.no_grad():  # norm weights of one would hide a mistake in how they are cut
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
        # The norms' eps is added to a mean that the cut makes larger: keep it far below that mean.
        model.embed_tokens.weight.mul_(50)
    return model


@pytest.fixture(scope="module")
def texts() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 60, n).astype(np.uint32) for n in generator.integers(1, 20, 30)]


def vectors(model: torch.nn.Module, texts: list[np.ndarray]) -> torch.Tensor:
    with torch.no_grad():
        return encode(model, texts, tokens_per_pass=10_000)


def test_keeping_everything_returns_the_same_outputs_bit_for_bit(
    backbone: torch.nn.Module, texts: list[np.ndarray]
) -> None:
    importance = measure(backbone, texts, tokens_per_pass=10_000)
    small = prune(backbone, choose(importance, layers=3, hidden=32, ffn=48))
    assert torch.equal(vectors(small, texts), vectors(backbone, texts))


def test_removing_parts_equals_masking_them(backbone: torch.nn.Module, texts: list[np.ndarray]) -> None:
    hidden = tuple(range(1, 32, 2))
    kept = Kept(layers=(0, 2), hidden=hidden, ffn=(tuple(range(0, 48, 3)), tuple(range(10, 26))))
    small = prune(backbone, kept)
    assert small.config.hidden_size == 16
    masked = random_backbone(SHAPE, 60, seed=0).eval()
    masked.load_state_dict(backbone.state_dict())
    gone = torch.tensor([channel for channel in range(32) if channel not in hidden])
    with torch.no_grad():
        masked.embed_tokens.weight[:, gone] = 0
        for number, layer in enumerate(masked.layers):
            layer.self_attn.o_proj.weight[gone] = 0
            layer.mlp.down_proj.weight[gone] = 0
            if number == 1:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            else:
                ffn = kept.ffn[kept.layers.index(number)]
                cut = torch.tensor([channel for channel in range(48) if channel not in ffn])
                layer.mlp.down_proj.weight[:, cut] = 0
    expected = vectors(masked, texts)[:, list(hidden)]
    torch.testing.assert_close(vectors(small, texts), expected, rtol=0, atol=1e-4)


def test_the_result_has_the_shape_and_count_asked_for(backbone: torch.nn.Module, texts: list[np.ndarray]) -> None:
    importance = measure(backbone, texts, tokens_per_pass=10_000)
    small = prune(backbone, choose(importance, layers=2, hidden=24, ffn=20))
    shape = Shape(hidden=24, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=20)
    assert count_parameters(small)[1] == non_embedding_parameters(shape)
    assert type(small) is type(backbone)


def test_dead_parts_are_the_first_to_go(texts: list[np.ndarray]) -> None:
    model = random_backbone(SHAPE, 60, seed=1).eval()
    with torch.no_grad():
        model.layers[1].self_attn.o_proj.weight.zero_()
        model.layers[1].mlp.down_proj.weight.zero_()
        model.layers[0].mlp.down_proj.weight[:, 7] = 0
        model.layers[0].mlp.up_proj.weight[9] = 0
    importance = measure(model, texts, tokens_per_pass=10_000)
    assert choose(importance, layers=2, hidden=32, ffn=48).layers == (0, 2)
    kept = choose(importance, layers=3, hidden=32, ffn=46).ffn[0]
    assert set(range(48)) - set(kept) == {7, 9}
    assert math.isclose(float(importance.layers_l[1]), 0, abs_tol=1e-6)


def test_more_than_there_is_is_refused() -> None:
    importance = Importance(torch.ones(8), torch.ones(2, 4), torch.ones(2))
    with pytest.raises(RecipeError, match=r"prune\.layers: 3 wanted, but the parent has 2"):
        choose(importance, layers=3, hidden=8, ffn=4)
