"""The family's shapes have the parameter counts that were published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.model.sizes import (
    BACKBONES,
    FAMILY,
    VOCABULARY,
    Shape,
    checkpoint_shape,
    count_parameters,
    kind_of,
    non_embedding_parameters,
    parameters,
    random_backbone,
)
from tests.model.small import FAMILIES, backbone

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
    assert all(parameter.is_meta for parameter in backbone.parameters()), "no memory was taken"
    assert count_parameters(backbone) == (PUBLISHED[name], non_embedding_parameters(FAMILY[name]))


@pytest.mark.parametrize(
    "shape", [FAMILY["80m"], Shape(hidden=24, layers=3, heads=6, kv_heads=2, head_dim=16, ffn=40)]
)
def test_the_counts_outside_the_embeddings_do_not_know_the_vocabulary(shape: Shape) -> None:
    for vocabulary in (7, 1000):
        with torch.device("meta"):
            total, outside = count_parameters(random_backbone(shape, vocabulary, seed=0))
        assert (total, outside) == (parameters(shape, vocabulary), non_embedding_parameters(shape))


def test_a_known_name_needs_no_download() -> None:
    assert checkpoint_shape("Qwen/Qwen3-0.6B") == (FAMILY["0.6b"], VOCABULARY)
    assert checkpoint_shape("Qwen/Qwen3-14B-Base") == (FAMILY["14b"], VOCABULARY)
    with pytest.raises(RecipeError, match=r"Qwen/Qwen3-9B.*Qwen/Qwen3-8B"):
        checkpoint_shape("Qwen/Qwen3-9B")
    assert set(BACKBONES.values()) == {"0.6b", "1.7b", "4b", "8b", "14b"}


def test_the_shape_of_a_local_folder_is_read_from_its_config(tmp_path: Path) -> None:
    shape = Shape(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=24, max_positions=64)
    random_backbone(shape, 50, seed=0).config.save_pretrained(tmp_path)
    assert checkpoint_shape(str(tmp_path)) == (shape, 50)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(RecipeError, match=r"config\.json.*'gpt2' is not a family known here"):
        checkpoint_shape(str(tmp_path))
    path.write_text(json.dumps({**config, "attention_bias": True}))
    with pytest.raises(RecipeError, match=r"config\.json: qwen3 with attention_bias"):
        checkpoint_shape(str(tmp_path))
    del config["head_dim"]
    path.write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"config\.json.*head_dim"):
        checkpoint_shape(str(tmp_path))
    path.write_text("{")
    with pytest.raises(RecipeError, match="not a model's config"):
        checkpoint_shape(str(tmp_path))


@pytest.mark.parametrize("kind", FAMILIES)
def test_checkpoints_of_every_family_are_counted_to_the_last_parameter(kind: str, tmp_path: Path) -> None:
    model = backbone(kind)
    model.config.save_pretrained(tmp_path)
    shape, vocabulary = checkpoint_shape(str(tmp_path))
    assert kind_of(shape) == model.config.model_type
    assert (parameters(shape, vocabulary), non_embedding_parameters(shape)) == count_parameters(model)


def test_the_seed_alone_makes_the_weights() -> None:
    shape = Shape(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=16)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (random_backbone(shape, 50, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state is left alone"
    assert torch.equal(first.embed_tokens.weight, again.embed_tokens.weight)
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)
