"""Models from elsewhere: a folder of ours without our own files is one, and must score as the engine does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.schema import query_text
from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.other_models import SentenceTransformers, on_disk, open_folder
from f2llm_ray.evaluate.tasks.retrieval_set import from_pairs
from f2llm_ray.model.checkpoint import INFO_FILE
from tests.tiny import LINES, tiny_model

INSTRUCTION = "Find the passage that answers."


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "ours")


def stranger(ours: Path, folder: Path, prompts: dict[str, str]) -> Path:
    """The same weights as a folder that only sentence-transformers knows, with these prompts."""
    shutil.copytree(ours, folder)
    (folder / INFO_FILE).unlink()
    settings = folder / "config_sentence_transformers.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "prompts": prompts}))
    return folder


def test_the_package_and_the_engine_give_the_same_scores(ours: Path, tmp_path: Path) -> None:
    prompt = query_text("", INSTRUCTION)
    other = open_folder(stranger(ours, tmp_path / "other", {"query": prompt, "document": ""}))
    assert isinstance(other, SentenceTransformers)
    assert other.info.dims == (32,)
    engine = open_folder(ours)
    assert isinstance(engine, Engine)
    texts = [*LINES, "", "é " * 200]
    for one, two in zip(engine.embed_counted(texts), other.embed_counted(texts), strict=True):
        assert np.allclose(one, two, atol=1e-5)
    rows = [(f"{line[:20]} {n}", f"{line} {n}", "deu") for n in range(20) for line in LINES]
    pairs = pa.table(dict(zip(("query", "passage", "language"), zip(*rows, strict=True), strict=True)))
    held = from_pairs(pairs, name="held", instruction=INSTRUCTION)
    a, b = held.measure(engine, (1, 2)), held.measure(other, (1, 2))
    assert a.scores["scores"] == b.scores["scores"]
    assert a.units.equals(b.units)
    assert list(b.scores["types"]) == ["32"]
    without = held.measure(open_folder(stranger(ours, tmp_path / "bare", {})), (1,))
    assert without.scores["scores"]["32"] != a.scores["scores"]["32"]


def test_a_name_on_the_hub_is_read_from_its_cache(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--org--small"
    stranger(ours, cached / "snapshots" / "0a1b", {})
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0a1b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with on_disk("org/small") as folder:
        other = open_folder(folder)
    vectors_nd, _ = open_folder(ours).embed_counted(LINES)
    assert np.allclose(other.embed_counted(LINES)[0], vectors_nd, atol=1e-5)
    with (
        pytest.raises(RunError, match=r"org/none: not a folder, and not found on the hub: ."),
        on_disk("org/none"),
    ):
        pass


def test_documents_get_their_prompt(ours: Path, tmp_path: Path) -> None:
    other = open_folder(stranger(ours, tmp_path / "e5", {"query": "query: ", "passage": "passage: "}))
    assert other.info.prompts == {"query": "query: ", "document": "passage: "}


def test_what_is_no_model_is_named(ours: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"expected f2llm\.json \(ours\) or modules\.json"):
        open_folder(tmp_path)
    broken = stranger(ours, tmp_path / "broken", {})
    (broken / "model.safetensors").unlink()
    with pytest.raises(RunError, match="broken: sentence-transformers cannot load it"):
        open_folder(broken)
