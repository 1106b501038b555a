"""A folder of sentence-transformers brings pooling, prompts and bounds; what the engine cannot run is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from f2llm_ray.base.errors import RecipeError, RunError
from f2llm_ray.data.tokens.tokenizer import open_tokenizer, template_of
from f2llm_ray.engine.engine import Engine
from f2llm_ray.model.brought import Brought, brought_by
from f2llm_ray.model.checkpoint import ModelInfo, load_backbone, load_info, matryoshka_dims, save_model
from f2llm_ray.model.dense import vector_dims
from f2llm_ray.model.families import FAMILIES, POOLINGS
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import InputIndex, model_inputs
from f2llm_ray.serve.bulk import survey
from f2llm_ray.serve.served_model import Arguments, find_model
from f2llm_ray.serve.shards import EmbedJob
from tests.encoders import KINDS, MAX_POSITIONS, encoder_folder
from tests.tiny import LINES, tiny_model

PROMPTS = {"query": "query: ", "passage": "passage: ", "other": "other: "}
CANNOT_CUT = FAMILIES["bert"].cannot_cut
TEXTS = [*LINES, "", "a", "unseen: žluťoučký kůň", "one two three " * 40]


def our_folder(folder: Path, stock: Path) -> Path:
    """The model folder that a run makes of a backbone before it trains."""
    brought, backbone = brought_by(str(stock)), load_backbone(stock)
    info = ModelInfo(
        name="ours",
        dims=matryoshka_dims(vector_dims(backbone)),
        max_tokens=MAX_POSITIONS - 2,
        prompts={"query": brought.query, "document": brought.document},
        instructions=False,
        pooling=brought.pooling,
    )
    save_model(folder, backbone, open_tokenizer(str(stock)), info)
    return folder


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_sentence_transformers_before_and_after(
    kind: str, pooling: str, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    stock = encoder_folder(tmp_path / "stock", kind, pooling=pooling, prompts=PROMPTS)
    ours = our_folder(tmp_path / "ours", stock)
    before = SentenceTransformer(str(stock), device="cpu")
    after = SentenceTransformer(str(ours), device="cpu")
    engine = Engine(ours)
    for name, theirs in (("query", "query"), ("document", "passage")):
        expected = before.encode(TEXTS, prompt_name=theirs)
        np.testing.assert_allclose(after.encode(TEXTS, prompt_name=name), expected, atol=1e-5)
        found = engine.embed(TEXTS, prompt=engine.info.prompts[name])
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_classes_load_the_folder_to_the_same_vectors(kind: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = our_folder(tmp_path / "ours", encoder_folder(tmp_path / "stock", kind))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    real = batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)
    np.testing.assert_allclose(Engine(folder).embed(TEXTS), vectors.numpy(), atol=1e-5)


def test_what_a_folder_says_is_what_it_brings(tmp_path: Path) -> None:
    stock = encoder_folder(tmp_path / "bert", "bert", pooling="cls", prompts=PROMPTS)
    assert brought_by(str(stock)) == Brought("cls", "query: ", "passage: ", MAX_POSITIONS, CANNOT_CUT)
    (stock / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 32, "pooling_mode": "lasttoken"}')
    assert brought_by(str(stock)).pooling == "last"
    (stock / "modules.json").unlink()
    assert brought_by(str(stock)) == Brought("mean", max_tokens=MAX_POSITIONS, cannot_cut=CANNOT_CUT)
    roberta = encoder_folder(tmp_path / "xlm-roberta", "xlm-roberta")
    assert brought_by(str(roberta)).max_tokens == MAX_POSITIONS - 2  # positions start past that of padding
    assert brought_by(str(tiny_model(tmp_path / "ours"))) == Brought("last")


def test_what_the_engine_does_not_compute_is_refused(tmp_path: Path) -> None:
    weighted = ("Transformer", "Pooling", "WordWeights", "Normalize")
    with pytest.raises(
        RunError, match=r"modules\.json: found WordWeights, which would be lost; expected Dense, Norm"
    ):
        brought_by(str(encoder_folder(tmp_path / "weighted", "bert", modules=weighted)))
    bare = encoder_folder(tmp_path / "bare", "bert", modules=("Transformer",))
    with pytest.raises(RunError, match=r"found Transformer, expected a Pooling among them"):
        brought_by(str(bare))
    highest = encoder_folder(tmp_path / "max", "bert", pooling="max")
    with pytest.raises(RunError, match=r"found pooling \['max_tokens'\], expected one of lasttoken, mean, cls"):
        brought_by(str(highest))
    pooling = highest / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode": "mean", "include_prompt": false}')
    with pytest.raises(RunError, match="include_prompt false"):
        brought_by(str(highest))
    with pytest.raises(RunError, match="cannot be loaded as a model"):
        brought_by(str(tmp_path))


def test_weights_that_are_not_there_are_told_and_a_head_is_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Left to itself, transformers fills in random ones and goes on."""
    from safetensors.torch import load_file, save_file

    stock = encoder_folder(tmp_path / "stock", "bert")
    weights = load_file(stock / "model.safetensors")
    assert any(name.startswith("pooler") for name in weights)
    assert not any(name.startswith("pooler") for name in load_backbone(stock).state_dict())
    assert "pooler" not in "".join(capfd.readouterr())
    del weights["encoder.layer.1.output.dense.bias"]
    save_file(weights, stock / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"1 weights are not there, such as encoder\.layer\.1\.output\.dense\.bias"):
        load_backbone(stock)


@pytest.mark.parametrize("model_type", ["gpt2", "no_such_model"])
def test_other_families_are_refused_at_every_door(model_type: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    (tmp_path / "in.csv").write_text("text\na\n")
    job = EmbedJob(model=str(folder), input=str(tmp_path / "in.csv"), column="text", output=str(tmp_path / "out"))
    doors = {
        "backbone": lambda: brought_by(str(folder)),
        "weights": lambda: load_backbone(folder),
        "facts": lambda: load_info(Folder.at(str(folder))),
        "evaluate": lambda: Engine(folder),
        "serve": lambda: find_model(Arguments(model=str(folder))),
        "embed": lambda: survey(job),
    }
    for door in doors.values():
        with pytest.raises(RunError, match=f"'{model_type}' is not a family known here; known are"):
            door()


def test_another_pooling_in_place_is_another_input(tmp_path: Path) -> None:
    stock = encoder_folder(tmp_path / "stock", "bert")
    before = InputIndex().known(model_inputs(str(stock)))
    (stock / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    after = InputIndex().known(model_inputs(str(stock)))
    assert [entry.uri for entry in after] == [entry.uri for entry in before]
    changed = [new.uri for old, new in zip(before, after, strict=True) if old.digest != new.digest]
    assert [uri.rpartition("stock/")[2] for uri in changed] == ["1_Pooling/config.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_of_its_own_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    stock = encoder_folder(tmp_path / "stock", kind)
    tokenizer = open_tokenizer(str(stock))
    start, end = ("<s>", "</s>") if kind == "xlm-roberta" else ("[CLS]", "[SEP]")
    assert template_of(tokenizer) == ([tokenizer.token_to_id(start)], tokenizer.token_to_id(end))
    assert tokenizer.encode("cat").tokens[0] == start


def test_a_template_with_two_tokens_at_the_end_is_refused(tmp_path: Path) -> None:
    stock = encoder_folder(tmp_path / "stock", "bert")
    content = json.loads((stock / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "[SEP]", "type_id": 0}}
    content["post_processor"]["single"].append(end)
    (stock / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(RecipeError, match="ends a text with \\['\\[SEP\\]', '\\[SEP\\]'\\], expected one token"):
        open_tokenizer(str(stock))
