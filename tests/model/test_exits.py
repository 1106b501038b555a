"""An exit of one forward pass gives the vectors of the model cut to its first layers, in every family."""

from __future__ import annotations

import copy

import pytest
import torch

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.engine.attention import use_varlen
from f2llm_ray.engine.encode import encode
from f2llm_ray.model.families import POOLINGS, Pooling
from f2llm_ray.model.prune import first_layers
from tests.model.small import FAMILIES, backbone, texts

EXITS = (1, 2)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_exits_are_the_vectors_of_the_first_layers(kind: str, pooling: Pooling, packed: bool) -> None:
    whole = backbone(kind).double()
    models = [whole, *(first_layers(whole, layers) for layers in EXITS)]
    for model in models if packed else ():
        use_varlen(model)
    given = texts()
    with torch.no_grad():
        found = encode(whole, given, pooling=pooling, tokens_per_pass=60, exits=EXITS).split(32, dim=1)
        expected = [encode(model, given, pooling=pooling, tokens_per_pass=60) for model in models]
    assert torch.equal(found[0], expected[0])
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        assert (ours - found[0]).abs().mean() > 0.05


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_first_layers_are_a_stock_model_and_the_parent_stays(kind: str) -> None:
    whole = backbone(kind)
    before = copy.deepcopy(whole.state_dict())
    small = first_layers(whole, 2)
    assert small.config.num_hidden_layers == 2
    assert type(small) is type(whole)
    for name, value in small.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())
    assert first_layers(whole, 3).config.to_dict() == whole.config.to_dict()
    for wrong in (0, 4):
        with pytest.raises(RecipeError, match=f"layers: found {wrong}, expected 1 to 3, which the model has"):
            first_layers(whole, wrong)


def test_no_texts_give_no_vectors_of_exits_either() -> None:
    assert encode(backbone("qwen3"), [], pooling="last", tokens_per_pass=60, exits=EXITS).shape == (0, 96)
