"""A model folder gives the same vectors through AutoModel, SentenceTransformer and our engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from f2llm_ray.base.errors import RunError
from f2llm_ray.engine.engine import Engine
from f2llm_ray.model.checkpoint import load_info, matryoshka_dims
from tests.tiny import tiny_model

TEXTS = ["hello", "", "ein Text mit Ümläuten", "日本語のテキスト", "a b c " * 100]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def test_stock_libraries_load_it_to_our_vectors(folder: Path) -> None:
    engine = Engine(folder)
    ours = engine.embed(TEXTS)
    stock = SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(ours, stock.encode(TEXTS), atol=1e-5)
    prompt = engine.info.prompts["query"]
    np.testing.assert_allclose(
        engine.embed(TEXTS, prompt=prompt), stock.encode(TEXTS, prompt_name="query"), atol=1e-5
    )
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    for text, vector in zip(TEXTS, ours, strict=True):
        tokens = tokenizer(text, truncation=True, max_length=engine.info.max_tokens, return_tensors="pt")
        with torch.no_grad():
            last = model(**tokens).last_hidden_state[0, -1]
        np.testing.assert_allclose(torch.nn.functional.normalize(last, dim=0), vector, atol=1e-5)


def test_smaller_dims_are_cut_and_unit_length(folder: Path) -> None:
    engine = Engine(folder)
    full, small = engine.embed(TEXTS), engine.embed(TEXTS, dim=8)
    expected = full[:, :8] / np.linalg.norm(full[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(small, expected, atol=1e-6)


def test_dims_are_doublings_and_the_hidden_size() -> None:
    assert matryoshka_dims(320) == (8, 16, 32, 64, 128, 256, 320)
    assert matryoshka_dims(1024) == (8, 16, 32, 64, 128, 256, 512, 1024)
    assert matryoshka_dims(8) == (8,)


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not a model folder: it has no f2llm\.json"):
        Engine(tmp_path)
    (tmp_path / "f2llm.json").write_text('{"name": 1}')
    with pytest.raises(RunError, match="not the facts of a model"):
        load_info(tmp_path)


def test_in_the_root_of_a_run_its_model_folders_are_named(tmp_path: Path) -> None:
    for name in ("trained-1a2b/model", "prepare-3c4d", "untrained-5e6f/model"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("trained-1a2b", "untrained-5e6f"):
        (tmp_path / name / "model" / "f2llm.json").write_text("{}")
    (tmp_path / "report.json").write_text("{}")
    both = f"the model folders in it are {tmp_path}/trained-1a2b/model, {tmp_path}/untrained-5e6f/model$"
    with pytest.raises(RunError, match=both):
        load_info(tmp_path)
    with pytest.raises(RunError, match=f"the model folders in it are {tmp_path}/trained-1a2b/model$"):
        load_info(tmp_path / "trained-1a2b")
    for place in ("prepare-3c4d", "nowhere", "report.json"):
        with pytest.raises(RunError, match=r"and no modules\.json$"):
            load_info(tmp_path / place)
