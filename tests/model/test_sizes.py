"""The family's shapes have the parameter counts that were published."""

from __future__ import annotations

import pytest
import torch

from f2llm_ray.model.sizes import (
    FAMILY,
    VOCABULARY,
    Shape,
    count_parameters,
    non_embedding_parameters,
    parameters,
    random_backbone,
)

PUBLISHED = {
    "80m": 80_084_288,
    "160m": 159_185_024,
    "330m": 334_349_184,
    "0.6b": 596_049_920,
    "1.7b": 1_720_574_976,
    "4b": 4_022_468_096,
    "8b": 7_568_405_504,
    "14b": 13_990_394_880,
}


@pytest.mark.parametrize("name", FAMILY)
def test_counts_are_the_published_ones_and_those_of_the_built_model(name: str) -> None:
    assert parameters(FAMILY[name]) == PUBLISHED[name]
    with torch.device("meta"):
        backbone = random_backbone(FAMILY[name], VOCABULARY, seed=0)
    assert count_parameters(backbone) == (PUBLISHED[name], non_embedding_parameters(FAMILY[name]))


def test_the_seed_alone_makes_the_weights() -> None:
    shape = Shape(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=16)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (random_backbone(shape, 50, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state is left alone"
    assert torch.equal(first.embed_tokens.weight, again.embed_tokens.weight)
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)
