"""The demo's search is exact at every dim, over HTTP, and refuses a corpus that the model did not make."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import uvicorn
from pyarrow import parquet as pq

from f2llm_ray.base.errors import RunError
from f2llm_ray.engine.engine import Engine
from f2llm_ray.model.dims import cut_dims
from f2llm_ray.run.folder import Folder
from f2llm_ray.serve.api import Info
from f2llm_ray.serve.bulk import SETTINGS, survey
from f2llm_ray.serve.replica import Replica
from f2llm_ray.serve.routes import web
from f2llm_ray.serve.search import MANIFEST, MOST_ROWS, cosines_by_dim
from f2llm_ray.serve.served_model import Arguments, find_model
from f2llm_ray.serve.shards import EmbedJob, ShardWriter
from tests.serve.conftest import free_port
from tests.tiny import tiny_model

TEXTS = [f"{word} {i}" for i in range(20) for word in ("the cat", "猫が", "<b>apple</b>", "кошка", "fuchs")]


@dataclass
class Demo:
    url: str
    model: Path
    corpus: Path


def embedded(model: Path, folder: Path) -> Path:
    """A corpus as jobs/embed.py leaves it, written in this process."""
    source = folder / "texts.parquet"
    pq.write_table(pa.table({"text": TEXTS}), source)
    job = EmbedJob(model=str(model), input=str(source), column="text", output=str(folder / "out"), keep=("text",))
    found, output = survey(job), Folder.at(job.output)
    output.write_json(SETTINGS, found.settings)
    for unit in found.waiting:
        ShardWriter(found.job).write(unit)
    output.write_json(MANIFEST, {**found.settings, "rows": len(TEXTS)})
    return folder / "out"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """The routes and the replica as Ray Serve has them, behind a plain HTTP server."""
    root = tmp_path_factory.mktemp("demo")
    model = tiny_model(root / "model")
    corpus = embedded(model, root)
    replica = Replica(find_model(Arguments(model=str(model), corpus=str(corpus))))
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(web(lambda: replica, Info), port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield Demo(f"http://127.0.0.1:{port}", model, corpus)
    server.should_exit = True
    thread.join(10)


def test_search_is_exact_at_every_dim(demo: Demo) -> None:
    assert httpx.get(demo.url + "/v1/models").json()["data"][0]["corpus_rows"] == len(TEXTS)
    ask = {"model": "tiny", "query": "die Katze", "top": 4, "prompt_name": None}
    answer = httpx.post(demo.url + "/search", json=ask).json()
    engine = Engine(demo.model)
    query, passages = engine.embed(["die Katze"]), engine.embed(TEXTS)
    assert list(answer["nearest"]) == ["8", "16", "32"]
    for dim, nearest in answer["nearest"].items():
        score = (cut_dims(passages, int(dim)) @ cut_dims(query, int(dim)).T)[:, 0]
        hits = [answer["hits"][index] for index in nearest]
        assert len(hits) == 4
        np.testing.assert_allclose([hit["scores"][dim] for hit in hits], np.sort(score)[::-1][:4], atol=2e-4)
        for hit in hits:
            assert hit["text"] == TEXTS[int(hit["id"])]
            assert hit["scores"][dim] == pytest.approx(score[int(hit["id"])], abs=2e-4)


def test_cosines_are_those_of_cut_vectors() -> None:
    generator = np.random.default_rng(0)
    vectors, query = generator.normal(size=(50, 24)).astype("f4"), generator.normal(size=24).astype("f4")
    vectors[3] = 0
    for dim, found in zip((8, 16, 24), cosines_by_dim(vectors, query, (8, 16, 24)), strict=True):
        part, other = vectors[:, :dim].astype("f8"), query[:dim].astype("f8")
        norms = np.linalg.norm(part, axis=1) * np.linalg.norm(other)
        np.testing.assert_allclose(found, part @ other / np.maximum(norms, 1e-9), atol=1e-6)


def test_the_page_loads_nothing_from_elsewhere(demo: Demo) -> None:
    response = httpx.get(demo.url + "/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|innerHTML", response.text)


@pytest.mark.parametrize(
    ("change", "status"), [({"model": "other"}, 404), ({"query": 3}, 400), ({"top": 0}, 400), ({"more": 1}, 400)]
)
def test_wrong_searches_are_refused(demo: Demo, change: dict[str, Any], status: int) -> None:
    response = httpx.post(demo.url + "/search", json={"model": "tiny", "query": "a", **change})
    assert response.status_code in {status, 422}
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_fingerprint": "0"}, "embedded by 'tiny' as it was then"),
        ({"keep": []}, "embed again with --keep-columns text"),
        ({"dimensions": 8}, "8 dims as float32: whole vectors"),
        ({"dtype": "int8"}, "32 dims as int8: whole vectors"),
        ({"rows": MOST_ROWS + 1}, "takes 1 to 100,000"),
    ],
)
def test_a_corpus_that_does_not_fit_is_refused(
    demo: Demo, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    manifest = json.loads((demo.corpus / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, **change}))
    with pytest.raises(RunError, match=message):
        find_model(Arguments(model=str(demo.model), corpus=str(tmp_path)))
    with pytest.raises(RunError, match="not a finished output"):
        find_model(Arguments(model=str(demo.model), corpus=str(tmp_path / "no")))
