"""Smaller vectors are sentence-transformers' ones; ranges and check vectors travel with the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.util import quantize_embeddings

from f2llm_ray.base.errors import RunError
from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.text_engine import Calibration, calibrate, load_calibration, save_calibration, self_check
from f2llm_ray.model.checkpoint import CALIBRATION_FILE
from f2llm_ray.model.dims import cut_dims, quantize_vectors
from f2llm_ray.run.folder import Folder
from tests.tiny import LINES, tiny_model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(tiny_model(tmp_path_factory.mktemp("model")))


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), dim=st.sampled_from([8, 12, 32]))
def test_every_type_is_sentence_transformers(seed: int, rows: int, dim: int) -> None:
    draw = np.random.default_rng(seed)
    vectors, others = (draw.standard_normal((n, dim)).astype(np.float32) for n in (rows, 20))
    ranges = np.stack([others.min(axis=0), others.max(axis=0)])
    ranges[:, 0] = 0  # a dim that never moved while the model was calibrated
    for ours, theirs in (("int8", "int8"), ("binary", "binary"), ("ubinary", "ubinary"), ("float", "float32")):
        made = quantize_vectors(vectors, ours, ranges)  # type: ignore[arg-type]
        wanted = quantize_embeddings(vectors, precision=theirs, ranges=ranges)  # type: ignore[arg-type]
        assert made.dtype == wanted.dtype
        np.testing.assert_array_equal(made, wanted)


def test_int8_needs_ranges_of_its_dims() -> None:
    vectors = np.ones((1, 8), dtype=np.float32)
    for ranges in (None, np.zeros((2, 16), dtype=np.float32)):
        with pytest.raises(ValueError, match="int8 needs ranges of 8 dims"):
            quantize_vectors(vectors, "int8", ranges)


def test_ranges_hold_every_calibration_vector_at_every_dim(tmp_path: Path, engine: Engine) -> None:
    tokens = engine.tokenize(LINES)
    save_calibration(Folder.at(str(tmp_path)), calibrate(engine, tokens))
    found = load_calibration(tmp_path)
    assert found is not None
    assert set(found.ranges) == set(engine.info.dims)
    whole = engine.embed(LINES)
    for dim, ranges in found.ranges.items():
        vectors = cut_dims(whole, dim)
        np.testing.assert_array_equal(ranges, [vectors.min(axis=0), vectors.max(axis=0)])
        coded = quantize_vectors(vectors, "int8", ranges)
        assert coded.min(axis=0).tolist() == [-128] * dim
        back = (coded.astype(np.float32) + 128.5) * (ranges[1] - ranges[0]) / 255 + ranges[0]
        cosine = np.sum(cut_dims(back, dim) * vectors, axis=1)
        assert cosine.min() > 0.999


def test_the_self_check_tells_models_apart(engine: Engine, tmp_path: Path) -> None:
    stored = calibrate(engine, engine.tokenize(LINES))
    self_check(engine, stored, "here")

    def turned(angle: float) -> Calibration:
        """The same with one vector turned by an angle: 1 - cosine is half its square."""
        check = stored.check_nd.copy()
        aside = np.roll(check[1], 1)
        aside -= (aside @ check[1]) * check[1]
        check[1] = np.cos(angle) * check[1] + np.sin(angle) * aside / np.linalg.norm(aside)
        return Calibration(stored.ranges, check)

    self_check(engine, turned(0.04), "here")  # 8e-4 away
    with pytest.raises(RunError, match=r"here: self-check failed: the vector of 'Кошка.* 0\.0012 away .*0\.001"):
        self_check(engine, turned(0.05), "here")
    with pytest.raises(RunError, match="self-check failed"):
        self_check(engine, Calibration(stored.ranges, np.full_like(stored.check_nd, np.nan)), "here")
    other = Engine(tiny_model(tmp_path / "other", hidden=64))
    with pytest.raises(RunError, match="vectors of 64 dims, stored ones have 32"):
        self_check(other, stored, "here")


def test_a_damaged_file_is_named(tmp_path: Path, engine: Engine) -> None:
    assert load_calibration(tmp_path) is None
    path = tmp_path / CALIBRATION_FILE
    save_calibration(Folder.at(str(tmp_path)), calibrate(engine, engine.tokenize(LINES)))
    whole = path.read_bytes()
    for content in (b"", b"\0" * 100, whole[:-5]):
        path.write_bytes(content)
        with pytest.raises(RunError, match=f"{CALIBRATION_FILE}: not the calibration of a model"):
            load_calibration(tmp_path)
    from safetensors.numpy import save_file

    for tensors in ({"x": np.zeros(1)}, {"check": np.zeros((6, 8)), "ranges.8": np.zeros((2, 9))}):
        save_file(tensors, path)
        with pytest.raises(RunError, match="not the calibration of a model"):
            load_calibration(tmp_path)
