"""Every engine gives the vectors of torch, for every family and pooling, alone and in any batch.

What an engine cannot run is refused in one line where it was asked for; auto leaves it to torch, with the reason.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from f2llm_ray.base.errors import DataError, RunError
from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.names import ENGINES, EngineName
from f2llm_ray.engine.runtimes import choice, graph_forward, pace, runtimes, store
from f2llm_ray.engine.runtimes.golden import text_of_length
from f2llm_ray.engine.runtimes.graph_forward import PADDING, plan_even
from f2llm_ray.engine.runtimes.own import EXPORT_FILE, model_key
from f2llm_ray.export.export import export
from f2llm_ray.model.checkpoint import load_info
from f2llm_ray.model.families import Pooling
from f2llm_ray.shrink.quantize import save_quantized
from tests.export.test_export import CASES, model_of
from tests.tiny import LINES, tiny_model

GRAPHS: tuple[EngineName, ...] = ("onnx", "openvino")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def exported(tiny: Path, tmp_path: Path) -> Path:
    """An export, which has no weights."""
    export(tiny, tmp_path / "export", ["onnx"])
    return tmp_path / "export"


@given(st.lists(st.integers(1, 3000), max_size=200), st.integers(64, 20_000))
def test_passes_hold_each_text_once_with_little_padding(lengths: list[int], budget: int) -> None:
    passes = plan_even(lengths, budget)
    assert sorted(index for indices in passes for index in indices) == list(range(len(lengths)))
    for indices in passes:
        longest = max(lengths[index] for index in indices)
        assert sum(longest - lengths[index] for index in indices) <= PADDING
        assert len(indices) == 1 or len(indices) * longest <= budget


@pytest.mark.parametrize(("kind", "pooling"), CASES)
def test_every_family_and_pooling(kind: str, pooling: Pooling, tmp_path: Path) -> None:
    folder = model_of(kind, tmp_path / "model", pooling)
    torch = Engine(folder)
    generator = np.random.default_rng(0)
    words = " ".join(LINES).split()
    texts = ["", "a", *(" ".join(generator.choice(words, size)) for size in generator.integers(1, 25, 40))]
    tokens = torch.tokenize(texts, max_tokens=torch.info.max_tokens)
    expected, raw = torch.embed_tokens(tokens), torch.encode(tokens).detach().numpy()
    order = generator.permutation(len(tokens))
    for name in ENGINES:
        engine = Engine(folder, engine=name)
        assert engine.device == "cpu"
        assert engine.engine in (GRAPHS if name == "auto" else (name,)) or engine.engine == "torch"
        found = engine.embed_tokens(tokens)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(engine.encode(tokens).detach().numpy(), raw, rtol=0, atol=1e-4)
        alone = np.concatenate([engine.embed_tokens([text]) for text in tokens])
        shuffled = engine.embed_tokens([tokens[place] for place in order])
        for other in (alone, shuffled[np.argsort(order)]):
            assert (found * other).sum(1).min() >= 0.99999
        for dim in engine.info.dims:
            np.testing.assert_allclose(
                engine.embed_tokens(tokens, dim=dim), torch.embed_tokens(tokens, dim=dim), rtol=0, atol=1e-4
            )
    assert Engine(folder, engine="auto").embed_tokens([]).shape == (0, 32)


def test_auto_takes_the_fastest_that_holds_and_says_so(
    tiny: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del empty_cache
    for fastest in ("onnx", "openvino", "torch"):
        paces = {name: 1.0 + (name != fastest) for name in ("onnx", "openvino", "torch")}
        monkeypatch.setattr(
            store, "pace", lambda forwards, _, paces=paces: {name: paces[name] for name in forwards}
        )
        monkeypatch.setattr(store, "cpu_name", lambda fastest=fastest: f"a CPU where {fastest} is fast")
        monkeypatch.setattr(choice, "cpu_name", store.cpu_name)
        assert Engine(tiny, engine="auto").engine == fastest
        said = capsys.readouterr().out
        assert f"tiny: engine {fastest}" in said
        assert ("making its files" in said) is (fastest == "onnx")  # once, whatever CPU shares the cache


def test_steps_of_a_run_make_no_files_unasked(
    tiny: Path, empty_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Engine(tiny, engine="auto", make=False).engine == "torch"
    assert "no files for other engines were made" in capsys.readouterr().out
    assert not empty_cache.exists()
    Engine(tiny, engine="onnx")
    Engine(tiny, engine="auto", make=False)
    assert "no files" not in capsys.readouterr().out


def test_a_graph_that_is_wrong_is_refused_by_its_golden_texts(
    tiny: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del empty_cache
    right = runtimes.RUNTIMES["onnx"]

    def wrong(path: Path, *, threads: int, output: runtimes.Output) -> graph_forward.Run:
        run = right.open(path, threads=threads, output=output)
        return lambda ids, mask: run(np.maximum(ids - 1, 0), mask)

    monkeypatch.setitem(runtimes.RUNTIMES, "onnx", runtimes.Runtime("onnxruntime", right.file, wrong))
    with pytest.raises(RunError, match=r"model\.onnx: the vector of .* has cosine .* expected at least"):
        Engine(tiny, engine="onnx")
    assert Engine(tiny, engine="auto").engine != "onnx"
    monkeypatch.setattr(choice, "installed", lambda: ["onnx"])
    assert Engine(tiny, engine="auto").engine == "torch"
    assert "engine torch: " in (said := capsys.readouterr().out)
    assert "expected at least 0.99999" in said


def test_a_damaged_file_of_the_cache_is_made_again(
    tiny: Path, empty_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = Engine(tiny, engine="onnx").embed(LINES)
    (graph,) = empty_cache.rglob("model.onnx")
    damage = bytearray(graph.read_bytes())
    damage[len(damage) // 2] ^= 1
    graph.write_bytes(damage)
    capsys.readouterr()
    np.testing.assert_array_equal(Engine(tiny, engine="onnx").embed(LINES), expected)
    assert "found another content" in (said := capsys.readouterr().out)
    assert "made again" in said
    (facts,) = empty_cache.rglob("graphs.json")
    facts.write_text("{}")
    assert Engine(tiny, engine="onnx").engine == "onnx"


def test_the_cache_knows_a_model_by_its_content(tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    key = model_key(tiny, load_info(tiny))
    assert model_key(copy, load_info(copy)) == key
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert model_key(copy, load_info(copy)) != key


def test_the_oldest_entries_go_where_there_are_too_many(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MOST_BYTES", 1)
    for hidden in (16, 32):
        Engine(tiny_model(tmp_path / f"{hidden}", hidden=hidden), engine="onnx")
    assert len(list(empty_cache.rglob("graphs.json"))) == 1


def test_an_export_without_weights_is_used_as_it_is(tiny: Path, exported: Path, empty_cache: Path) -> None:
    for name in ("auto", "onnx"):
        engine = Engine(exported, engine=name)
        assert engine.engine == "onnx"
        np.testing.assert_allclose(engine.embed(LINES), Engine(tiny).embed(LINES), rtol=0, atol=1e-5)
    assert not empty_cache.exists()
    with pytest.raises(RunError, match="cannot be loaded as a model"):
        Engine(exported)
    graph = exported / "onnx/model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    for name in ("auto", "onnx"):
        with pytest.raises(RunError, match=r"onnx/model\.onnx: found another content"):
            Engine(exported, engine=name)


def test_an_export_of_other_weights_is_not_used(
    tiny: Path, exported: Path, empty_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(tiny / "model.safetensors", exported / "model.safetensors")
    assert json.loads((exported / EXPORT_FILE).read_text())["model"] == model_key(exported, load_info(exported))
    assert Engine(exported, engine="onnx").engine == "onnx"
    assert not empty_cache.exists()
    other = tiny_model(exported.with_name("other"), hidden=16)
    for name in ("model.safetensors", "config.json", "f2llm.json"):
        shutil.copyfile(other / name, exported / name)
    assert Engine(exported, engine="onnx").embed(LINES).shape == (len(LINES), 16)
    assert "not made from the weights beside it" in capsys.readouterr().out
    assert empty_cache.exists()


def test_long_texts_go_through_torch(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "long", max_tokens=3000)
    torch, graph = Engine(folder), Engine(folder, engine="onnx")
    texts = [text_of_length(torch.tokenizer, tokens, LINES) for tokens in (2500, 10, 2048, 2200)]
    lengths = []
    run = graph.forward.encode
    graph.forward.encode = lambda tokens: (lengths.extend(map(len, tokens)), run(tokens))[1]  # type: ignore[method-assign]
    np.testing.assert_allclose(graph.embed(texts), torch.embed(texts), rtol=0, atol=1e-5)
    assert sorted(lengths) == [10, 2048]


def test_what_cannot_be_is_refused_in_one_line_or_left_to_torch(
    tiny: Path,
    tmp_path: Path,
    empty_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    del empty_cache
    save_quantized(tiny, tmp_path / "int8")
    with pytest.raises(RunError, match="its weights are int8"):
        Engine(tmp_path / "int8", engine="openvino")
    assert Engine(tmp_path / "int8", engine="auto").engine == "torch"
    assert "engine torch: " in capsys.readouterr().out

    with monkeypatch.context() as patch:
        patch.setattr(runtimes, "_version", lambda _: "")
        with pytest.raises(DataError, match="'openvino' is not installed"):
            Engine(tiny, engine="openvino")
        assert Engine(tiny, engine="auto").engine == "torch"
        assert "neither openvino nor onnxruntime is installed" in capsys.readouterr().out
    for name, value, reason in (("free_memory", lambda: 1000, "memory"), ("ONE_FILE", 10, "in float32")):
        with monkeypatch.context() as patch:
            patch.setattr(choice, name, value)
            assert Engine(tiny, engine="auto").engine == "torch"
            assert reason in capsys.readouterr().out
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(RunError, match="cannot be written"):
        Engine(tiny, engine="onnx")
    assert Engine(tiny, engine="auto").engine == "torch"
    assert pace.cpu_name()
