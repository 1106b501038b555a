"""Exports: every family's file gives the engine's vectors, whatever the batch and the side of its padding.

And a file that is damaged, wrong, or cannot be held is refused by name.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from f2llm_ray.base.errors import DataError, RunError
from f2llm_ray.commands.command_line import main
from f2llm_ray.commands.export import parser
from f2llm_ray.commands.export import run as job
from f2llm_ray.data.tokens.tokenizer import load_tokenizer
from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.runtimes import onnx_file, openvino_file
from f2llm_ray.engine.runtimes.golden import LONGEST, TENSORS_FILE, Golden, text_of_length
from f2llm_ray.engine.runtimes.own import EXPORT_FILE
from f2llm_ray.engine.runtimes.proof import FLOAT, SIZES, Bounds, Ints, Run, padded, plan, prove
from f2llm_ray.export.export import check, export
from f2llm_ray.model.checkpoint import load_info, matryoshka_dims, save_model
from f2llm_ray.model.families import POOLINGS, Pooling
from f2llm_ray.shrink.quantize import save_quantized
from tests.encoders import KINDS, encoder_folder
from tests.model.small import DECODERS, TWO_WAY_GEMMA, backbone
from tests.model.test_dense import DIMS as DENSE_DIMS
from tests.model.test_dense import mapped_model
from tests.tiny import LINES, tiny_model

TEXTS = [*LINES, "", "a", " ".join(LINES * 3)]
CASES: list[tuple[str, Pooling]] = [
    *(("qwen3", pooling) for pooling in POOLINGS),
    *(("bert", pooling) for pooling in POOLINGS),
    ("llama", "last"),
    ("gemma3_text", "mean"),
    (TWO_WAY_GEMMA, "mean"),
    ("xlm-roberta", "mean"),
    ("xlm-roberta", "cls"),
    ("modernbert", "cls"),
]


def model_of(kind: str, folder: Path, pooling: Pooling) -> Path:
    """A tiny model folder of a family: an encoder as sentence-transformers writes it, a decoder as we do."""
    if kind in KINDS:
        prompts = {"query": "query: ", "document": "passage: "}
        return encoder_folder(folder, kind, pooling=pooling, prompts=prompts)
    made = tiny_model(folder.with_name(f"{folder.name}-tokenizer"))
    info = load_info(made)
    facts = {**info.__dict__, "dims": matryoshka_dims(32), "pooling": pooling, "name": kind}
    tokenizer = load_tokenizer(made)
    small: Any = backbone(kind, vocabulary=tokenizer.get_vocab_size())
    save_model(folder, small, tokenizer, type(info)(**facts))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def made(tiny: Path) -> Path:
    """The tiny model in every runtime."""
    export(tiny, tiny.with_name("export"), ["onnx", "openvino", "gguf"])
    return tiny.with_name("export")


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.mark.parametrize(("kind", "pooling"), CASES)
def test_every_family_and_pooling(
    kind: str, pooling: Pooling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 32 dims of random weights are moved further by int8 steps than a trained model's.
    monkeypatch.setattr(onnx_file, "INT8", Bounds(0.98, 0.99, every_dim=False))
    model = model_of(kind, tmp_path / "model", pooling)
    facts = export(model, tmp_path / "out", ["onnx"])
    assert set(facts["proofs"]) == {onnx_file.FLOAT_FILE, onnx_file.INT8_FILE}
    # Beside the proof, by another way: all texts at once, with other ids where there is padding.
    engine = Engine(model)
    tokens = engine.tokenize(TEXTS, max_tokens=engine.info.max_tokens)
    assert max(map(len, tokens)) == engine.info.max_tokens
    run = onnx_file.open_onnx(tmp_path / "out" / onnx_file.FLOAT_FILE)
    for side in ("left", "right"):
        ids, mask = padded(tokens, side)
        found = run(np.where(mask == 1, ids, 7), mask)
        np.testing.assert_allclose(found, engine.embed_tokens(tokens), rtol=0, atol=1e-5)
    assert check(tmp_path / "out") == facts["proofs"]


@pytest.mark.parametrize("kind", ["bert", "modernbert", TWO_WAY_GEMMA])
def test_openvino(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, tmp_path / "model", "mean")
    export(model, tmp_path / "out", ["openvino"])
    assert not (tmp_path / "out" / "onnx").exists()
    engine = Engine(model)
    tokens = engine.tokenize(TEXTS, max_tokens=engine.info.max_tokens)
    found = openvino_file.open_openvino(tmp_path / "out" / openvino_file.FILE)(*padded(tokens, "left"))
    np.testing.assert_allclose(found, engine.embed_tokens(tokens), rtol=0, atol=1e-5)


def test_a_map_after_pooling_is_in_the_graphs_and_refused_as_gguf(tmp_path: Path) -> None:
    model, out = mapped_model(tmp_path / "model"), tmp_path / "out"
    export(model, out, ["onnx", "openvino"])
    engine = Engine(model)
    tokens = engine.tokenize(TEXTS, max_tokens=engine.info.max_tokens)
    expected = engine.embed_tokens(tokens)
    assert expected.shape[1] == DENSE_DIMS
    for run in (
        onnx_file.open_onnx(out / onnx_file.FLOAT_FILE),
        openvino_file.open_openvino(out / openvino_file.FILE),
    ):
        np.testing.assert_allclose(run(*padded(tokens, "right")), expected, rtol=0, atol=1e-5)
    assert (out / "2_Dense" / "model.safetensors").is_file(), (
        "sentence-transformers reads it beside its own backends"
    )
    with pytest.raises(RunError, match=r"modules\.json: a Dense module cannot be written as GGUF here"):
        export(model, tmp_path / "gguf", ["gguf"])


def test_int8_weights_and_float_activations(made: Path) -> None:
    graph = onnx.load(made / onnx_file.INT8_FILE).graph
    kinds = [node.op_type for node in graph.node]
    # Queries, keys, values, output, and three of the FFN, in two layers.
    assert kinds.count("MatMulNBits") == 14
    assert not {kind for kind in kinds if "Quantize" in kind}
    large = {weight.name: weight.data_type for weight in graph.initializer if np.prod(weight.dims) > 400}
    assert set(large.values()) == {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    said = json.loads((made / EXPORT_FILE).read_text())["proofs"][onnx_file.INT8_FILE]
    assert said["least"] < 0.999999  # it is another file than the float one


def test_hidden_states_of_the_graph_are_those_of_the_stock_class(tiny: Path, made: Path) -> None:
    import onnxruntime
    import torch
    from transformers import AutoModel, AutoTokenizer

    batch = AutoTokenizer.from_pretrained(made)(LINES, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tiny)(**batch).last_hidden_state.numpy()
    session = onnxruntime.InferenceSession(made / onnx_file.FLOAT_FILE)
    found, _ = session.run(None, {name: value.numpy() for name, value in batch.items()})
    real = batch["attention_mask"].numpy() == 1
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=1e-5)


def test_weights_that_are_too_large_lie_beside_the_graph(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "ONE_FILE", 1000)
    export(tiny, tmp_path / "out", ["onnx"])
    assert (tmp_path / "out" / f"{onnx_file.FLOAT_FILE}_data").stat().st_size > 50_000
    assert (tmp_path / "out" / f"{onnx_file.INT8_FILE}_data").is_file()
    check(tmp_path / "out")


def test_golden_texts_reach_the_longest_and_beyond(tiny: Path, made: Path) -> None:
    tokenizer, golden, longest = load_tokenizer(tiny), Golden.load(made), load_info(tiny).max_tokens
    whole = [len(tokenizer.encode(text).ids) for text in golden.texts]
    assert {1, longest - 1, longest, longest + 1, 3 * longest} <= set(whole)
    assert [len(ids) for ids in golden.tokens] == [min(length, longest) for length in whole]
    assert len(golden.vectors_vd) == len(golden.texts)
    prompt = load_info(tiny).prompts["query"]
    assert any(text.startswith(prompt) for text in golden.texts)
    assert text_of_length(tokenizer, LONGEST + 5, LINES).startswith(LINES[0])


def test_every_text_is_in_a_batch_of_every_size_on_both_sides(made: Path) -> None:
    golden = Golden.load(made)
    batches = list(plan(golden.tokens))
    everyone = list(range(len(golden.tokens)))
    assert sorted(i for chosen, _ in batches[: len(everyone)] for i in chosen) == everyone
    assert {len(chosen) for chosen, _ in batches[: len(everyone)]} == {1}
    together = batches[len(everyone) :]
    for side in ("right", "left"):
        assert {len(chosen) for chosen, found in together if found == side} >= set(SIZES) - {1}
        # Once in each size; what is left over is a smaller batch.
        assert sorted(i for chosen, found in together if found == side for i in chosen) == sorted(everyone * 3)


def _tables(golden: Golden) -> Callable[[Ints, Ints], Any]:
    """A runtime that looks the golden vectors up."""
    known = {tuple(ids.tolist()): vector for ids, vector in zip(golden.tokens, golden.vectors_vd, strict=True)}

    def run(ids: Ints, mask: Ints) -> Any:
        return np.stack([known[tuple(row[real == 1].tolist())] for row, real in zip(ids, mask, strict=True)])

    return run


def _nan(run: Run) -> Run:
    return lambda ids, mask: run(ids, mask) * (np.nan if len(ids) == 7 else 1)


def _short(run: Run) -> Run:
    return lambda ids, mask: run(ids, mask)[:, :16]


def _by_batch(run: Run) -> Run:
    return lambda ids, mask: run(ids, mask) + (0.0009 if len(ids) == 32 else 0)


def _by_side(run: Run) -> Run:
    return lambda ids, mask: run(ids, mask) if mask[:, 0].all() else np.roll(run(ids, mask), 1, axis=0)


def _first_dims(run: Run) -> Run:
    return lambda ids, mask: run(ids, mask) + 0.02 * (np.arange(32) < 8)


@pytest.mark.parametrize(
    ("wrong", "bounds", "message"),
    [
        (_nan, FLOAT, r"here: a vector that is not finite for '.*' \(a batch of 7, padded right\)"),
        (_short, FLOAT, r"here: vectors of shape \(1, 16\), expected \(1, 32\)"),
        (
            _by_batch,
            Bounds(0.9, 0.9),
            r"\(a batch of 32, padded right\) has cosine .* with that of the text alone",
        ),
        (_by_side, FLOAT, r"\(a batch of 2, padded left\) has cosine .* with the model's own"),
        (_first_dims, FLOAT, r"\(a batch of 1, padded right\) has cosine .* at 8 dims with the model's own"),
        (lambda run: run, Bounds(0.9, 1.01), r"mean cosine 1.0+ at 8 dims .* at least 1.01 is expected"),
    ],
    ids=["nan", "short", "by batch", "by side", "first dims", "mean"],
)
def test_a_wrong_runtime_is_found(made: Path, wrong: Callable[[Run], Run], bounds: Bounds, message: str) -> None:
    golden = Golden.load(made)
    run = _tables(golden)
    assert prove(run, golden, (8, 16, 32), FLOAT, "here")["least"] == 1
    with pytest.raises(RunError, match=message):
        prove(wrong(run), golden, (8, 16, 32), bounds, "here")


def test_the_job_exports_and_checks(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "a" / "out")
    assert main(parser(), job, ["--model", str(tiny), "--output", out, "--dry-run"]) == 0
    assert capsys.readouterr().out == f"would write tiny for onnx to {out}, and prove it\n"
    assert not (tmp_path / "a").exists()
    assert main(parser(), job, ["--model", str(tiny), "--output", out]) == 0
    assert main(parser(), job, ["--check", out]) == 0
    told = capsys.readouterr().out
    assert "onnx/model.onnx: cosine 1.000000 at least" in told
    assert told.endswith(f"{out}: every proof holds\n")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert main(parser(), job, ["--model", str(tiny)]) == 1


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _other_weights(folder: Path) -> None:
    """A file that is whole, with a sum that fits, of another model."""
    path = folder / onnx_file.FLOAT_FILE
    model = onnx.load(path)
    for weight in model.graph.initializer:
        if len(weight.dims) == 2:
            values = onnx.numpy_helper.to_array(weight)
            weight.CopyFrom(onnx.numpy_helper.from_array(np.round(values, 1), weight.name))
    onnx.save(model, path)
    _sums(folder, onnx_file.FLOAT_FILE)


def _other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:20]
    path.write_text(json.dumps(content))
    _sums(folder, "tokenizer.json")


def _not_onnx(folder: Path) -> None:
    (folder / onnx_file.FLOAT_FILE).write_bytes(b"nothing")
    _sums(folder, onnx_file.FLOAT_FILE)


def _sums(folder: Path, name: str) -> None:
    import hashlib

    facts = json.loads((folder / EXPORT_FILE).read_text())
    content = (folder / name).read_bytes()
    facts["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / EXPORT_FILE).write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: _flip(folder / onnx_file.FLOAT_FILE), "model.onnx: found another content"),
        (lambda folder: _flip(folder / "gguf/tiny-F16.gguf"), "tiny-F16.gguf: found another content"),
        (lambda folder: (folder / TENSORS_FILE).write_bytes(b""), "golden.safetensors: found 0 bytes, expected"),
        (lambda folder: (folder / openvino_file.FILE).unlink(), "openvino_model.xml: it is missing"),
        (lambda folder: (folder / EXPORT_FILE).unlink(), "not an export: it has no f2llm/export.json"),
        (lambda folder: (folder / EXPORT_FILE).write_text("{}"), "export.json: not the facts of an export"),
        (_other_weights, r"model.onnx: the vector of '.*' \(a batch of 1, padded right\) has cosine"),
        (_other_tokenizer, "tokenizer.json: "),
        (_not_onnx, "model.onnx: ONNX Runtime does not load it"),
    ],
)
def test_a_damaged_export_fails(
    copy: Path, damage: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy)
    with pytest.raises(RunError, match=message) as caught:
        check(copy)
    assert main(parser(), job, ["--check", str(copy)]) == 1
    assert capsys.readouterr().err == f"error: {caught.value}\n"


def test_a_proof_that_fails_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "FLOAT", Bounds(1.1, 1.1))
    out = tmp_path / "out"
    with pytest.raises(RunError, match=f"{out}/onnx/model.onnx: the vector of .* expected at least 1.1"):
        export(tiny, out, ["onnx"])
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused_by_name(
    tiny: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(RunError, match=r"--to: found 'tflite', expected some of onnx, openvino, gguf"):
        export(tiny, out, ["onnx", "tflite"])
    with pytest.raises(RunError, match="it is there already"):
        export(tiny, made, ["onnx"])
    save_quantized(tiny, tmp_path / "int8")
    with pytest.raises(RunError, match="its weights are int8; export the model that it was made from"):
        export(tmp_path / "int8", out, ["onnx"])
    with pytest.raises(RunError, match="not a model folder"):
        export(tmp_path, out, ["onnx"])
    broken = Path(shutil.copytree(tiny, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="broken: cannot be loaded as a model"):
        export(broken, out, ["onnx"])
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DataError, match=r"package 'openvino' is not installed.*f2llm-ray\[export\]"):
        export(tiny, out, ["openvino"])
    assert not out.exists()


def test_families_of_the_cases_are_all() -> None:
    assert {kind for kind, _ in CASES} == {*DECODERS, TWO_WAY_GEMMA, *KINDS}
