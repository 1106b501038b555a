"""Int8 weights: each value to half a scale, vectors close to the float ones, and none depends on its batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from f2llm_ray.base.errors import RunError
from f2llm_ray.engine.encode import encode
from f2llm_ray.engine.engine import Engine
from f2llm_ray.model.checkpoint import load_backbone
from f2llm_ray.model.int8 import (
    WEIGHTS_FILE,
    Int8Linear,
    is_quantized,
    load_quantized,
    quantize,
    quantize_rows,
)
from f2llm_ray.model.sizes import count_parameters
from f2llm_ray.shrink.quantize import compare, save_quantized
from tests.model.small import FAMILIES, backbone, texts
from tests.tiny import LINES, tiny_model


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "float", hidden=64)


@pytest.fixture(scope="module")
def small(parent: Path) -> Path:
    folder = parent.parent / "int8"
    save_quantized(parent, folder)
    return folder


def test_each_value_comes_back_to_half_a_scale() -> None:
    weight = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 50)[:, None]
    weight[7] = 0
    q, scale = quantize_rows(weight)
    error = (q.double() * scale.double()[:, None] - weight.double()).abs().amax(dim=1)
    assert torch.all(error <= scale.double() * 0.5001)
    assert torch.equal(q[7], torch.zeros(30, dtype=torch.int8))
    assert q[[0, 3]].abs().amax(dim=1).tolist() == [127, 127]


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_the_sum_of_its_int8_products(bias: bool) -> None:
    """Against float64: activations rounded per token, weights per channel, nothing else."""
    generator = torch.Generator().manual_seed(0)
    layer = Int8Linear(37, 5, bias=bias)
    q, scale = quantize_rows(torch.randn(5, 37, generator=generator))
    layer.weight.data, layer.scale = q, scale
    offset = torch.randn(5, generator=generator) if bias else torch.zeros(5)
    if layer.bias is not None:
        layer.bias.data = offset
    x = torch.randn(2, 3, 37, generator=generator) * 100
    step = x.double().abs().amax(dim=-1, keepdim=True) / 127
    expected = torch.round(x.double() / step) * step @ (q.double() * scale.double()[:, None]).T + offset
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-4)


def test_vectors_stay_close_and_bytes_shrink(parent: Path, small: Path) -> None:
    engine = Engine(parent)
    facts = compare(parent, small, engine.tokenize(LINES))
    assert facts["cosine"]["mean"] > 0.998
    assert facts["cosine"]["least"] > 0.99
    before, after = ((parent / "model.safetensors").stat().st_size, (small / WEIGHTS_FILE).stat().st_size)
    assert after < 0.35 * before


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_vectors(family: str) -> None:
    """Gemma scales what it looks up in the embeddings."""
    model, given = backbone(family), texts()
    expected = encode(model, given, pooling="last", tokens_per_pass=64)
    for embeddings in (False, True):
        found = encode(quantize(model, embeddings=embeddings), given, pooling="last", tokens_per_pass=64)
        cosine = torch.cosine_similarity(found, expected, dim=1)
        assert cosine.min() > 0.97
        assert cosine.mean() > 0.995


def test_a_vector_does_not_depend_on_its_batch(small: Path) -> None:
    engine = Engine(small)
    loud = "!" * 50 + " ".join(LINES)
    together = engine.embed([*LINES, loud])[: len(LINES)]
    alone = np.concatenate([engine.embed([line]) for line in LINES])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_folder_counts_its_parameters_as_the_parent_does(parent: Path, small: Path) -> None:
    assert is_quantized(small)
    assert not is_quantized(parent)
    assert count_parameters(load_backbone(small)) == count_parameters(load_backbone(parent))


def test_a_folder_gives_the_vectors_of_the_model_in_memory(parent: Path, small: Path) -> None:
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    in_memory = quantize(load_backbone(parent).eval())
    with torch.no_grad():
        assert torch.equal(in_memory(ids).last_hidden_state, load_quantized(small)(ids).last_hidden_state)


def test_embeddings_stay_float_where_asked(parent: Path, tmp_path: Path) -> None:
    save_quantized(parent, tmp_path, embeddings=False)
    dtypes = {name: value.dtype for name, value in load_file(tmp_path / WEIGHTS_FILE).items()}
    assert dtypes["embed_tokens.weight"] is torch.float32
    assert dtypes["layers.0.mlp.up_proj.weight"] is torch.int8
    assert load_backbone(tmp_path).get_input_embeddings().weight.dtype is torch.float32


def test_bad_folders_are_told(parent: Path, small: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="int8 already"):
        save_quantized(small, tmp_path / "again")
    with pytest.raises(RunError, match="not a model folder"):
        save_quantized(tmp_path, tmp_path / "again")
    save_quantized(parent, tmp_path / "cut")
    path = tmp_path / "cut" / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RunError, match="cannot be loaded"):
        load_backbone(tmp_path / "cut")
    save_file({"embed_tokens.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(RunError, match=r"other weights than config\.json says"):
        load_backbone(tmp_path / "cut")
    assert json.loads((small / "config.json").read_text())["hidden_size"] == 64
