"""One real Ray Serve application on loopback, asked by the clients that people use."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from f2llm_ray.base.errors import RunError
from f2llm_ray.serve.app import build
from tests.serve.endpoint import MAX_BODY, MAX_QUEUED, TEXTS, Server, error_of
from tests.tiny import MAX_TOKENS, tiny_model


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_vectors_are_those_of_sentence_transformers(server: Server, client: openai.OpenAI) -> None:
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(server.folder), device="cpu")
    answer = client.embeddings.create(model="tiny", input=TEXTS, extra_body={"truncate": True})
    ours = np.array([entry.embedding for entry in answer.data])
    assert cosine(ours, peer.encode(TEXTS)).min() >= 0.9999
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    assert answer.usage.prompt_tokens == sum(min(len(t), MAX_TOKENS) for t in server.engine.tokenize(TEXTS))
    queries = server.embed(TEXTS, prompt_name="query", truncate=True)
    assert cosine(queries, peer.encode(TEXTS, prompt_name="query")).min() >= 0.9999
    asked = server.embed(TEXTS, instruction="Find the passage that answers.", truncate=True)
    np.testing.assert_allclose(asked, queries, atol=1e-5)


def test_async_client_and_models(server: Server) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(
                    client.embeddings.create(model="tiny", input=text, encoding_format="float")
                    for text in TEXTS[:8]
                )
            )
            ours = np.array([answer.data[0].embedding for answer in answers], dtype=np.float32)
            np.testing.assert_allclose(ours, server.engine.embed(TEXTS[:8]), atol=1e-5)
            assert [model.id async for model in client.models.list()] == ["tiny"]

    asyncio.run(ask())


def test_info_and_health(server: Server) -> None:
    info = httpx.get(f"{server.url}/info").json()
    assert (info["model"], info["dims"], info["max_tokens"]) == ("tiny", [8, 16, 32], MAX_TOKENS)
    # The report's limits, with the arguments before them.
    limits = info["limits"]
    assert limits["max_tokens"] == MAX_TOKENS
    assert (limits["max_inputs"], limits["max_queued"], limits["max_body_bytes"]) == (16, MAX_QUEUED, MAX_BODY)
    health = httpx.get(f"{server.url}/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    assert "/v1/embeddings" in httpx.get(f"{server.url}/openapi.json").json()["paths"]


@pytest.mark.parametrize("dim", [8, 16, 32])
def test_dimensions(server: Server, client: openai.OpenAI, dim: int) -> None:
    answer = client.embeddings.create(model="tiny", input=TEXTS[:3], dimensions=dim)
    expected = server.engine.embed(TEXTS[:3], dim=dim)
    np.testing.assert_allclose([entry.embedding for entry in answer.data], expected, atol=1e-5)


def test_a_batch_is_its_texts_one_by_one(server: Server) -> None:
    batch = server.embed(TEXTS, truncate=True)
    single = np.concatenate([server.embed(text, truncate=True) for text in TEXTS])
    np.testing.assert_allclose(batch, single, atol=1e-5)


def test_forms_of_input_and_output_agree(server: Server) -> None:
    ids = [[int(token) for token in tokens] for tokens in server.engine.tokenize(TEXTS[:3])]
    expected = server.engine.embed(TEXTS[:3])
    for given in (TEXTS[:3], ids, [tokens[:-1] for tokens in ids]):
        for encoding in ("float", "base64"):
            content = {"model": "tiny", "input": given, "encoding_format": encoding}
            rows = [e["embedding"] for e in server.post("/v1/embeddings", content).json()["data"]]
            ours = [np.frombuffer(base64.b64decode(r), "<f4") if encoding == "base64" else r for r in rows]
            np.testing.assert_allclose(ours, expected, atol=1e-5)
    lone = server.post("/v1/embeddings", {"model": "tiny", "input": ids[0]}).json()["data"]
    np.testing.assert_allclose(lone[0]["embedding"], expected[0], atol=1e-5)


ERRORS: dict[str, tuple[str, Any, int, str]] = {
    "json": ("/v1/embeddings", b"{", 400, "invalid_json"),
    "shape": ("/v1/embeddings", {"model": "tiny", "input": {"a": 1}}, 400, "invalid_request"),
    "surrogate": ("/embed", b'{"inputs": "\\ud83d"}', 400, "invalid_text"),
    "model": ("/v1/embeddings", {"model": "gpt", "input": "a"}, 404, "model_not_found"),
    "many": ("/embed", {"inputs": ["a"] * 17}, 413, "too_many_inputs"),
    "large": ("/embed", {"inputs": "a" * MAX_BODY}, 413, "body_too_large"),
    "dims": ("/embed", {"inputs": "a", "dimensions": 9}, 422, "invalid_dimensions"),
    "empty": ("/embed", {"inputs": [""]}, 422, "empty_input"),
    "none": ("/v1/embeddings", {"model": "tiny", "input": []}, 422, "empty_input"),
    "long": ("/embed", {"inputs": TEXTS[-1]}, 422, "too_many_tokens"),
    "id": ("/v1/embeddings", {"model": "tiny", "input": [5, 10**6]}, 422, "invalid_token"),
    "big id": ("/v1/embeddings", {"model": "tiny", "input": [2**63]}, 422, "invalid_token"),
    "prompt": ("/embed", {"inputs": "a", "prompt_name": "no"}, 422, "invalid_prompt"),
    "ids": ("/v1/embeddings", {"model": "tiny", "input": [5], "prompt_name": "query"}, 422, "invalid_prompt"),
    "format": ("/v1/embeddings", {"model": "tiny", "input": "a", "encoding_format": "hex"}, 422, "invalid_value"),
    "route": ("/v2/embeddings", {}, 404, "not_found"),
    "method": ("/health", {}, 405, "method_not_allowed"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(server: Server, name: str) -> None:
    route, content, status, code = ERRORS[name]
    response = server.post(route, content)
    assert (response.status_code, error_of(response)["code"]) == (status, code)


def test_a_body_without_a_length_is_cut_off(server: Server) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"inputs": "'
        for _ in range(200):
            yield b"a" * 1000

    response = httpx.post(f"{server.url}/embed", content=chunks(), timeout=30)
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")


def test_the_official_client_shows_our_message(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="allowed: 8, 16, 32"):
        client.embeddings.create(model="tiny", input="a", dimensions=24)
    with pytest.raises(openai.NotFoundError, match="served: tiny"):
        client.embeddings.create(model="gpt", input="a")


async def _ask_all(server: Server, texts: list[str], at_once: int, width: int) -> list[httpx.Response]:
    gate = asyncio.Semaphore(at_once)
    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:

        async def ask(text: str) -> httpx.Response:
            async with gate:
                return await client.post("/embed", json={"inputs": [text] * width})

        return await asyncio.gather(*(ask(text) for text in texts))


def test_32_clients_each_get_their_own_vectors(server: Server) -> None:
    texts = [f"text {i} " + "cat " * (i % 20) for i in range(256)]
    responses = asyncio.run(_ask_all(server, texts, at_once=32, width=1))
    assert {response.status_code for response in responses} == {200}
    ours = np.array([response.json()[0] for response in responses])
    np.testing.assert_allclose(ours, server.engine.embed(texts), atol=1e-5)


def test_overload_is_refused_with_429_and_no_other_way(server: Server) -> None:
    texts = ["the cat sat on the mat " * 4] * 160
    responses = asyncio.run(_ask_all(server, texts, at_once=160, width=16))
    assert {response.status_code for response in responses} == {200, 429}
    refused = next(response for response in responses if response.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert error_of(refused)["code"] == "overloaded"
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_nothing_to_serve_is_one_sentence(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "report.json").write_text('{"models": []}')
    (tmp_path / "report.json").write_text(
        json.dumps({"models": [{"name": "a", "folder": "model"}], "serving": {"model": "b"}})
    )
    for args, message in (
        ({"root": str(tmp_path / "no")}, "no finished run: it has no report.json"),
        ({"root": str(tmp_path / "broken")}, "not the report of a run"),
        ({"root": str(tmp_path)}, "model 'b' is not one of a"),
        ({"model": str(tmp_path)}, "not a model folder"),
        ({}, "set exactly one of root and model"),
        ({"root": "a", "model": "b"}, "set exactly one of root and model"),
        ({"model": str(folder), "max_queued": 0}, "max_queued: Input should be greater"),
        ({"model": str(folder), "depth": 3}, "depth: Extra inputs are not permitted"),
    ):
        with pytest.raises(RunError, match=message):
            build(args)
