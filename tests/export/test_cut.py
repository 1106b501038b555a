"""A cut folder is a stock model that gives the vectors of the exit and the dims it was cut at."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize
from transformers import AutoModel

from f2llm_ray.base.errors import RunError
from f2llm_ray.commands.main import main
from f2llm_ray.data.schema import TextPrompts
from f2llm_ray.data.tokens.tokenizer import load_tokenizer
from f2llm_ray.engine.encode import encode
from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.text_engine import calibrate, save_calibration, self_check
from f2llm_ray.export.cut import cut
from f2llm_ray.export.export import export
from f2llm_ray.export.publish import publish
from f2llm_ray.model.checkpoint import load_backbone, load_info, save_model
from f2llm_ray.report.model_card import model_card
from f2llm_ray.run.folder import Folder
from f2llm_ray.shrink.quantize import save_quantized
from tests.tiny import LINES, tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers that was trained with an exit after the first."""
    plain = tiny_model(tmp_path_factory.mktemp("plain") / "tiny")
    folder = plain.parent / "elastic"
    info = replace(load_info(plain), name="elastic", exits=(1,))
    save_model(folder, load_backbone(plain), load_tokenizer(plain), info)
    engine = Engine(folder)
    save_calibration(Folder.at(str(folder)), calibrate(engine, engine.tokenize(LINES)))
    report = {"name": "run", "created": "2026-01-01", "languages": {"deu": 3, "eng": 5, "code:python": 2}}
    (folder / "README.md").write_text(model_card(report, {"name": "stage2"}, info))
    return folder


@pytest.mark.parametrize(("layers", "dims"), [(1, None), (None, 8), (1, 16), (2, 32)])
def test_every_loader_gives_the_vectors_of_the_exit(
    made: Path, tmp_path: Path, layers: int | None, dims: int | None
) -> None:
    facts = cut(made, tmp_path / "cut", layers=layers, dims=dims)
    whole = Engine(made)
    tokens = whole.tokenize(LINES)
    with torch.no_grad():
        of_both = encode(whole.forward.backbone, tokens, pooling="last", tokens_per_pass=512, exits=(1,))
    raw_nd = of_both[:, 32:] if layers == 1 else of_both[:, :32]
    expected = normalize(raw_nd[:, :dims], dim=1).numpy()
    engine = Engine(tmp_path / "cut")
    np.testing.assert_allclose(engine.embed(LINES), expected, atol=1e-5)
    stock = SentenceTransformer(str(tmp_path / "cut"), device="cpu")
    np.testing.assert_allclose(stock.encode(LINES), expected, atol=1e-5)
    assert stock.get_sentence_embedding_dimension() == (dims or 32) == expected.shape[1]
    assert AutoModel.from_pretrained(tmp_path / "cut").config.num_hidden_layers == (layers or 2)
    self_check(engine, engine.calibration, "cut")
    assert (facts["layers"], facts["of_layers"], facts["dims"]) == (layers or 2, 2, dims or 32)


def test_the_folder_says_what_it_is(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "cut"
    facts = cut(made, out, layers=1, dims=16)
    info = load_info(out)
    assert (info.name, info.dims, info.exits) == ("elastic-1-layers-16-dims", (8, 16), ())
    assert info.prompts == load_info(made).prompts
    config = json.loads((out / "config.json").read_text())
    assert config["matryoshka_dimensions"] == [8, 16]
    said = json.loads((out / "f2llm" / "cut.json").read_text())
    assert said == facts
    assert said["parent"] == "elastic"
    card = (out / "README.md").read_text()
    assert "the first 1 of 2 layers of `elastic`, and of its vectors the first 16 of 32 dims" in card
    assert "pooled[:, :16]" in card
    assert "dims: 8, 16;" in card
    front = card.split("---")[1]
    assert "- de" in front
    assert "- code" in front
    assert publish(out, "team/cut", "mit").address is None
    only_dims = tmp_path / "dims"
    cut(made, only_dims, dims=16)
    ranges = Engine(only_dims).ranges
    assert set(ranges) == {8, 16}, "they are those of the whole model"
    assert all(np.array_equal(ranges[dim], Engine(made).ranges[dim]) for dim in ranges)
    assert load_info(only_dims).exits == (1,)
    assert not Engine(out).ranges, "of fewer layers they would have to be measured on training text"


def test_what_it_was_not_trained_for_is_refused(made: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "cut", tiny_model(tmp_path / "plain")
    for model, wanted, words in (
        (plain, {"layers": 1}, r"layers: found 1, expected all 2: it has no exits.*elastic.layers, or prune"),
        (made, {"layers": 3}, r"layers: found 3, expected one of \[1\]"),
        (made, {"dims": 12}, r"dims: found 12, expected one of \[8, 16, 32\]"),
    ):
        with pytest.raises(RunError, match=words):
            cut(model, out, **wanted)
    save_quantized(made, tmp_path / "int8")
    with pytest.raises(RunError, match="its weights are int8; cut the model that it was made from"):
        cut(tmp_path / "int8", out, layers=1)
    assert not out.exists()
    with pytest.raises(RunError, match="it is there already"):
        cut(made, plain, layers=1)


def test_a_model_of_fewer_dims_is_exported_and_trained_like_any_other(made: Path, tmp_path: Path) -> None:
    from f2llm_ray.data.tokens.build import write_prompts
    from f2llm_ray.model.settings import Backbone
    from f2llm_ray.pipeline.work import make_untrained

    cut(made, tmp_path / "cut", dims=16)
    export(tmp_path / "cut", tmp_path / "onnx", ["onnx"])  # with its own proof: vectors as the folder's
    prepared = Folder.at(str(tmp_path / "prepared"))
    write_prompts(prepared, TextPrompts())
    (tmp_path / "prepared" / "tokenizer").symlink_to(made)
    out, backbone = tmp_path / "out", Backbone(path=str(tmp_path / "cut"))
    make_untrained(backbone, 0, model_name="a", max_tokens=64, prepared=prepared, out=Folder.at(str(out)))
    assert load_info(out / "model").dims == (8, 16)
    np.testing.assert_array_equal(Engine(out / "model").embed(LINES), Engine(tmp_path / "cut").embed(LINES))


def test_the_command_says_what_it_wrote(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["cut", "--model", str(made), "--output", str(tmp_path / "cut")]
    assert main(argv) == 1
    assert capsys.readouterr().err == "error: give --layers, --dims or both\n"
    assert main([*argv, "--layers", "1", "--dry-run"]) == 0
    assert "would write 1 of 2 layers and 32 of 32 dims of elastic" in capsys.readouterr().out
    assert not (tmp_path / "cut").exists()
    assert main([*argv, "--layers", "1", "--dims", "8"]) == 0
    assert "1 of 2 layers and 8 of 32 dims of elastic" in capsys.readouterr().out
    assert (tmp_path / "cut" / "modules.json").is_file()
