"""A linear map after pooling is part of a model: in the engine, in folders of ours and foreign ones, when cut."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.tokens.store import tokenize
from f2llm_ray.data.tokens.tokenizer import load_tokenizer
from f2llm_ray.engine.encode import encode
from f2llm_ray.engine.engine import Engine
from f2llm_ray.model.brought import brought_by
from f2llm_ray.model.checkpoint import fingerprint, load_backbone, load_info, save_model
from f2llm_ray.model.dense import dense_of, end_in, vector_dims
from f2llm_ray.model.embeddings import main_dims, take_embeddings
from f2llm_ray.model.prune import Kept, prune
from f2llm_ray.model.settings import Soup
from f2llm_ray.model.sizes import Shape, random_backbone
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import model_inputs
from f2llm_ray.shrink.importance import magnitude, measure
from f2llm_ray.shrink.quantize import save_quantized
from f2llm_ray.train.merge_models import merge_models
from tests.encoders import encoder_folder
from tests.model.test_brought import PROMPTS, TEXTS, our_folder
from tests.tiny import LINES, tiny_model

DIMS = 20
IDENTITY = "torch.nn.modules.linear.Identity"


def with_dense(folder: Path, *, place: int = 2, bias: bool = True, dims: int = DIMS, **said: Any) -> Path:
    """Gives a folder of sentence-transformers a Dense module, as its version 6 writes it."""
    path, modules = f"{place}_Dense", json.loads((folder / "modules.json").read_text())
    modules.insert(place, {"path": path, "type": "sentence_transformers.base.modules.dense.Dense"})
    modules = [{**entry, "idx": number, "name": str(number)} for number, entry in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / path).mkdir()
    config = {"in_features": 32, "out_features": dims, "bias": bias, "activation_function": IDENTITY, **said}
    (folder / path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(1)
    weights = {"linear.weight": torch.randn(dims, 32, generator=generator)}
    weights |= {"linear.bias": torch.randn(dims, generator=generator)} if bias else {}
    save_file(weights, folder / path / "model.safetensors")
    return folder


def mapped_model(folder: Path, seed: int = 0) -> Path:
    """The tiny model of ours with a random map to `DIMS` dims."""
    plain = tiny_model(folder.with_name(f"{folder.name}-plain"))
    backbone = load_backbone(plain)
    end_in(backbone, DIMS, "here")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in dense_of(backbone).parameters():  # type: ignore[union-attr]
            weight.copy_(torch.randn(weight.shape, generator=generator))
    save_model(folder, backbone, load_tokenizer(plain), replace(load_info(plain), dims=(DIMS,)))
    return folder


def encoded(folder: Path) -> torch.Tensor:
    """Unit vectors of `TEXTS` in float64, by the engine's encoder."""
    info, tokenizer = load_info(folder), load_tokenizer(folder)
    tokens = tokenize(tokenizer, TEXTS, info.max_tokens)
    with torch.no_grad():
        backbone = load_backbone(folder).double().eval()
        return normalize(encode(backbone, tokens, pooling=info.pooling, tokens_per_pass=256), dim=1)


def stock(folder: Path) -> torch.Tensor:
    """The same by sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu").double()
    found: torch.Tensor = model.encode(TEXTS, prompt="", convert_to_tensor=True)
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_foreign_folder_gives_the_vectors_of_sentence_transformers(
    tmp_path: Path, pooling: str, *, bias: bool
) -> None:
    folder = with_dense(encoder_folder(tmp_path / "stock", "bert", pooling=pooling, prompts=PROMPTS), bias=bias)
    assert load_info(folder).dims == (DIMS,)
    assert brought_by(str(folder)).pooling == pooling
    expected = stock(folder)
    assert expected.shape == (len(TEXTS), DIMS)
    torch.testing.assert_close(encoded(folder), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(Engine(folder).embed(TEXTS), expected.numpy(), atol=1e-5)
    ours = our_folder(tmp_path / "ours", folder)  # what a run starts from
    torch.testing.assert_close(encoded(ours), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(stock(ours), expected, rtol=0, atol=1e-12)


def test_a_folder_of_ours_gives_them_too(tmp_path: Path) -> None:
    folder = mapped_model(tmp_path / "ours")
    torch.testing.assert_close(encoded(folder), stock(folder), rtol=0, atol=1e-12)
    state = load_file(folder / "model.safetensors")
    assert not any("dense" in name for name in state), "AutoModel's weights are the backbone's alone"


def test_the_map_is_part_of_what_a_model_is_known_by(tmp_path: Path) -> None:
    folder = mapped_model(tmp_path / "one")
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    weights = load_file(other / "2_Dense" / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, other / "2_Dense" / "model.safetensors")
    prints = [fingerprint(Folder.at(str(path))) for path in (folder, other)]
    assert prints[0] != prints[1]
    assert any(file.uri.endswith("2_Dense/model.safetensors") for file in model_inputs(str(folder)))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"activation_function": "torch.nn.modules.activation.Tanh"},
            r"activation_function torch\..*Tanh, expected",
        ),
        ({"activation_function": "mine.Identity"}, r"activation_function mine\.Identity, expected"),
        ({"use_residual": True}, "use_residual true, expected false"),
        ({"module_input_name": "token_embeddings"}, "module_input_name 'token_embeddings'"),
        ({"place": 3}, "found Transformer, Pooling, Normalize, Dense; expected one Dense, right after Pooling"),
        ({"place": 1}, "found Transformer, Dense, Pooling, Normalize; expected one Dense"),
        ({"in_features": None}, "found in_features None"),
    ],
)
def test_other_maps_are_refused_at_every_door(tmp_path: Path, said: dict[str, Any], message: str) -> None:
    folder = with_dense(encoder_folder(tmp_path / "stock", "bert"), **said)
    for door in (brought_by, load_backbone, load_info, Engine):
        with pytest.raises(RunError, match=message):
            door(folder if door is not brought_by else str(folder))  # type: ignore[operator]


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = with_dense(encoder_folder(tmp_path / "stock", "bert"))
    twice = with_dense(Path(shutil.copytree(folder, tmp_path / "twice")), place=3)
    with pytest.raises(RunError, match="expected one Dense"):
        load_info(twice)
    config = folder / "2_Dense" / "config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "in_features": 31}))
    with pytest.raises(
        RunError, match=r"2_Dense/config\.json: found in_features 31, expected the hidden size, 32"
    ):
        load_backbone(folder)
    config.write_text(json.dumps({**said, "out_features": 21}))
    with pytest.raises(
        RunError, match=r"2_Dense/model\.safetensors: found weights .*\[20, 32\].* expected .*\[21, 32"
    ):
        load_backbone(folder)
    config.write_text(json.dumps(said))
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"2_Dense/model\.safetensors: not there"):
        load_backbone(folder)


def test_a_pruned_map_is_the_parents_with_the_channels_that_went_at_0(tmp_path: Path) -> None:
    folder = mapped_model(tmp_path / "model")
    parent = load_backbone(folder).double().eval()
    hidden = tuple(range(0, 32, 2))
    every = (tuple(range(64)),) * 2
    small = prune(parent, Kept(layers=(0, 1), hidden=hidden, ffn=every, kv_heads=((0, 1),) * 2))
    assert vector_dims(small) == DIMS
    tokens = tokenize(load_tokenizer(folder), LINES, 64)
    found = encode(small, tokens, pooling="last", tokens_per_pass=256)
    dense, whole = dense_of(small), dense_of(parent)
    assert dense is not None
    assert whole is not None
    del small.dense
    pooled_nd = torch.zeros(len(LINES), 32, dtype=torch.float64)
    pooled_nd[:, list(hidden)] = encode(small, tokens, pooling="last", tokens_per_pass=256)
    torch.testing.assert_close(found, whole(pooled_nd), rtol=0, atol=1e-12)
    # And what pruning goes by reads such a model.
    scores = measure(parent, tokens, pooling="last", tokens_per_pass=256).importance()
    assert (scores.layers_l > 0).all()
    assert magnitude(parent).hidden_d.shape == (32,)


def test_merged_maps_are_their_mean_and_int8_ones_stay_close(tmp_path: Path) -> None:
    one, other = mapped_model(tmp_path / "one"), mapped_model(tmp_path / "other", seed=1)
    out = Folder.at(str(tmp_path / "merged"))
    folders = [Folder.at(str(path)) for path in (one, other)]
    merge_models(Soup(models=("a/b", "c/d")), folders, "both", out)
    merged = load_file(tmp_path / "merged" / "model" / "2_Dense" / "model.safetensors")
    parts = [load_file(path / "2_Dense" / "model.safetensors") for path in (one, other)]
    for name, value in merged.items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2)
    with pytest.raises(RunError, match=r"dims is .*expected"):
        merge_models(
            Soup(models=("a/b", "c/d")), [folders[0], Folder.at(str(tiny_model(tmp_path / "t")))], "x", out
        )
    save_quantized(one, tmp_path / "int8")
    cosine_n = np.sum(Engine(tmp_path / "int8").embed(LINES) * Engine(one).embed(LINES), axis=1)
    assert cosine_n.min() > 0.99


def test_a_model_ends_where_it_is_told_once(tmp_path: Path) -> None:
    backbone = load_backbone(tiny_model(tmp_path / "model")).double()
    tokens = tokenize(load_tokenizer(tmp_path / "model"), LINES, 64)
    before = encode(backbone, tokens, pooling="last", tokens_per_pass=256)
    end_in(backbone, 40, "stage 'one'")
    dense_of(backbone).double()  # type: ignore[union-attr]
    after = encode(backbone, tokens, pooling="last", tokens_per_pass=256)
    torch.testing.assert_close(after[:, :32], before)  # it starts as the identity
    assert not after[:, 32:].any()
    assert encode(backbone, [], pooling="last", tokens_per_pass=256).shape == (0, 40)
    end_in(backbone, 40, "stage 'one'")
    with pytest.raises(
        RunError, match="stage 'one': the student ends in a Dense module of 40 dims, its teacher's"
    ):
        end_in(backbone, 41, "stage 'one'")


# Embeddings of another model.


def test_no_table_of_so_many_dims_is_nearer_in_dot_products() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    for dims in (3, 12):
        found = main_dims(table, dims)
        assert float(found.square().mean()) == pytest.approx(1)
        values = torch.linalg.svdvals(table)
        best = (table @ table.T - _scaled(found, table) @ _scaled(found, table).T).norm()
        assert float(best) == pytest.approx(float(values[dims:].pow(4).sum().sqrt()), abs=1e-9)
        torch.testing.assert_close(found, main_dims(table.clone(), dims), rtol=0, atol=0)


def _scaled(found: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """A cut table at the size of the one that it is of: its squares are the largest singular values' ones."""
    kept = torch.linalg.svdvals(table)[: found.shape[1]].square().sum()
    return found * (kept / found.square().sum()).sqrt()


def test_embeddings_of_another_tokenizer_or_fewer_dims_are_refused(tmp_path: Path) -> None:
    theirs = tiny_model(tmp_path / "theirs")
    entries = load_tokenizer(theirs).get_vocab_size()
    shape = Shape(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=16)
    backbone = random_backbone(shape, entries, 0)
    take_embeddings(backbone, str(theirs), Folder.at(str(theirs)))
    expected = main_dims(load_backbone(theirs).get_input_embeddings().weight.detach(), 16)
    torch.testing.assert_close(backbone.get_input_embeddings().weight.detach(), expected)
    wide = random_backbone(shape.model_copy(update={"hidden": 64}), entries, 0)
    with pytest.raises(RunError, match=r"embeddings_from: .*found embeddings of .*, expected at least .*64\]"):
        take_embeddings(wide, str(theirs), Folder.at(str(theirs)))
    other = encoder_folder(tmp_path / "other", "bert")
    with pytest.raises(RunError, match="not the run's tokenizer, from which it differs in"):
        take_embeddings(backbone, str(other), Folder.at(str(theirs)))
