"""What the endpoint adds to OpenAI's contract: types, keys, ids, logs, counters, a family behind one router."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from f2llm_ray import __version__
from f2llm_ray.engine.text_engine import load_calibration
from f2llm_ray.model.dims import cut_dims, quantize_vectors
from tests.serve.endpoint import KEYED, ROUTER, TEXTS, Server, error_of
from tests.tiny import MAX_TOKENS

SHORT = TEXTS[:4]


def expected(server: Server, dim: int) -> dict[str, np.ndarray[Any, Any]]:
    calibration = load_calibration(server.folder)
    assert calibration is not None
    vectors = cut_dims(server.engine.embed(SHORT), dim)
    kinds = ("float", "int8", "binary", "ubinary")
    return {kind: quantize_vectors(vectors, kind, calibration.ranges[dim]) for kind in kinds}


@pytest.mark.parametrize("dim", [8, 32])
def test_embedding_types(server: Server, dim: int) -> None:
    wanted = expected(server, dim)
    for kind, rows in wanted.items():
        ask = {"model": "tiny", "input": SHORT, "dimensions": dim, "embedding_types": [kind]}
        numbers = server.post("/v1/embeddings", ask).json()["data"]
        packed = server.post("/v1/embeddings", {**ask, "encoding_format": "base64"}).json()["data"]
        assert all("embeddings" not in entry for entry in numbers)
        ours = np.array([entry["embedding"] for entry in numbers])
        unpacked = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in packed]
        # A step of int8 may go either way for a value that lies on its edge.
        tolerance = 1 if kind == "int8" else 1e-5 if kind == "float" else 0
        np.testing.assert_allclose(ours, rows, atol=tolerance)
        np.testing.assert_allclose(np.array(unpacked, dtype=ours.dtype), ours, atol=tolerance)
    several = {"input": SHORT, "model": "tiny", "dimensions": dim, "embedding_types": ["int8", "float", "int8"]}
    for entry, row in zip(server.post("/v1/embeddings", several).json()["data"], wanted["float"], strict=True):
        assert list(entry["embeddings"]) == ["int8", "float"]
        assert entry["embedding"] == entry["embeddings"]["int8"]
        np.testing.assert_allclose(entry["embeddings"]["float"], row, atol=1e-5)
    plain = server.post("/embed", {"inputs": SHORT, "dimensions": dim, "embedding_types": ["ubinary", "float"]})
    assert list(plain.json()) == ["ubinary", "float"]
    np.testing.assert_array_equal(plain.json()["ubinary"], wanted["ubinary"])


@pytest.mark.parametrize("route", ["/v1/embeddings", "/embed"])
def test_null_means_unset(server: Server, route: str) -> None:
    """As OpenAI reads it: LiteLLM sends null for what its user left out."""
    field = {"/v1/embeddings": "input", "/embed": "inputs"}[route]
    ask = {"model": "tiny", field: ["one", "two"]}
    nulls = dict.fromkeys(("encoding_format", "truncate", "dimensions", "prompt_name", "embedding_types"))
    plain, given = (server.post(route, body) for body in (ask, ask | nulls))
    assert given.status_code == 200, given.text
    assert given.json() == plain.json()
    missing = server.post(route, {**ask, field: None})
    assert (missing.status_code, error_of(missing)["param"]) == (400, field)


def test_one_model_and_heads(server: Server) -> None:
    """Clients look a model up before they ask it, and probes ask for heads alone."""
    listed = httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"]
    assert httpx.get(f"{server.url}/v1/models/tiny", timeout=60).json() == listed[0]
    named = httpx.get(
        f"{server.url}{KEYED}/v1/models/text-embedding-3-small",
        headers={"Authorization": f"Bearer {server.key}"},
        timeout=60,
    )
    assert "text-embedding-3-small" in named.json()["aliases"]
    other = httpx.get(f"{server.url}/v1/models/gpt-4", timeout=60)
    assert (other.status_code, error_of(other)["code"]) == (404, "model_not_found")
    for path in ("/health", "/v1/models", "/v1/models/tiny", "/info"):
        head = httpx.head(f"{server.url}{path}", timeout=60)
        assert (head.status_code, head.content) == (200, b"")


def test_types_that_are_refused(server: Server) -> None:
    for types, status, code in (
        ([], 422, "invalid_value"),
        (["float16"], 422, "invalid_value"),
        (["int8"] * 5, 400, "invalid_request"),
        ("int8", 400, "invalid_request"),
    ):
        error = server.post("/embed", {"inputs": "a", "embedding_types": types})
        assert (error.status_code, error_of(error)["code"]) == (status, code), types
        assert error_of(error)["param"] == "embedding_types"
    without = server.post(f"{KEYED}/embed", {"inputs": "a", "embedding_types": ["int8"]}, server.key)
    assert (without.status_code, error_of(without)["code"]) == (422, "not_calibrated")
    assert "allowed: float, binary, ubinary" in error_of(without)["message"]


def test_the_card_says_what_the_report_measured(server: Server) -> None:
    (card,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    scores = {"set": {"32": {"ndcg@10": 0.5, "acc@1": 0.25, "recall@10": 0.75}}}
    assert (card["id"], card["parameters"], card["scores"]) == ("tiny", 123, scores)
    assert (card["dims"], card["created"]) == ([8, 16, 32], 1767323045)
    assert card["embedding_types"] == ["float", "int8", "binary", "ubinary"]
    info = httpx.get(f"{server.url}/info").json()
    assert (info["self_checked"], info["version"]) == (True, __version__)
    assert "keys" not in json.dumps(info)


def test_keys_are_asked_for(server: Server) -> None:
    for route in ("/v1/embeddings", "/embed", "/v1/models", "/info", "/nothing"):
        for headers in ({}, {"Authorization": "Bearer f2-wrong"}, {"Authorization": server.key}):
            refused = httpx.request(
                "GET" if route[1] != "e" else "POST", server.url + KEYED + route, headers=headers
            )
            assert refused.status_code == 401, route
            assert refused.headers["www-authenticate"] == "Bearer"
            assert error_of(refused)["code"] == "invalid_api_key"
    assert httpx.get(f"{server.url}{KEYED}/health").status_code == 200
    assert server.post(f"{KEYED}/embed", {"inputs": "a"}, server.key).status_code == 200
    with openai.OpenAI(base_url=f"{server.url}{KEYED}/v1", api_key=server.key, max_retries=0) as client:
        answer = client.embeddings.create(model="text-embedding-3-small", input="a")
        assert (answer.model, len(answer.data[0].embedding)) == ("wide", 64)
    with (
        openai.OpenAI(base_url=f"{server.url}{KEYED}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="is not known here"),
    ):
        client.embeddings.create(model="wide", input="a")


def test_a_key_has_its_rate(server: Server) -> None:
    codes = [server.post(f"{KEYED}/embed", {"inputs": "a"}, server.slow_key) for _ in range(3)]
    assert [answer.status_code for answer in codes] == [200, 200, 429]
    assert error_of(codes[2])["code"] == "rate_limit_exceeded"
    assert 1 <= int(codes[2].headers["retry-after"]) <= 30


def test_request_ids_and_the_access_log(server: Server) -> None:
    private = "a text that no log may hold"
    given = {"Authorization": f"Bearer {server.key}", "X-Request-ID": "id-of-the-client"}
    content = {"inputs": [private, "b"]}
    answer = httpx.post(f"{server.url}{KEYED}/embed", json=content, headers=given, timeout=60)
    assert answer.headers.get_list("x-request-id") == ["id-of-the-client"]
    assert httpx.get(f"{server.url}{KEYED}/nothing/{private}").headers["x-request-id"]
    deadline = time.monotonic() + 60
    while "id-of-the-client" not in (log := server.log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    (line,) = [line for line in log.splitlines() if "id-of-the-client" in line]
    found = json.loads(line[line.index("{") : line.rindex("}") + 1])
    assert {key: found[key] for key in ("key", "method", "route", "status", "model", "inputs")} == {
        "key": "tests",
        "method": "POST",
        "route": "/embed",
        "status": 200,
        "model": "wide",
        "inputs": 2,
    }
    assert found["tokens"] > 2
    assert found["ms"] > 0
    assert private not in log
    assert server.key not in log


def test_the_router_picks_by_model(server: Server) -> None:
    for name, dim in (("tiny", 32), ("wide", 64), ("text-embedding-3-small", 64)):
        with openai.OpenAI(base_url=f"{server.url}{ROUTER}/v1", api_key=server.key, max_retries=0) as client:
            data = client.embeddings.create(model=name, input=SHORT).data
        assert len(data[0].embedding) == dim
        if name == "tiny":
            np.testing.assert_allclose([row.embedding for row in data], server.engine.embed(SHORT), atol=1e-5)
    direct = server.embed(SHORT)
    routed = server.post(f"{ROUTER}/embed", {"inputs": SHORT}, server.key)
    np.testing.assert_allclose(routed.json(), direct, atol=1e-5)
    wide = server.post(f"{ROUTER}/embed", {"inputs": SHORT, "model": "wide"}, server.key)
    assert len(wide.json()[0]) == 64


def test_the_router_lists_and_refuses(server: Server) -> None:
    headers = {"Authorization": f"Bearer {server.key}"}
    listed = httpx.get(f"{server.url}{ROUTER}/v1/models", headers=headers).json()["data"]
    assert [(card["id"], card["dims"][-1], card["aliases"]) for card in listed] == [
        ("tiny", 32, []),
        ("wide", 64, ["text-embedding-3-small"]),
    ]
    info = httpx.get(f"{server.url}{ROUTER}/info", headers=headers).json()
    assert (info["default"], len(info["models"])) == ("tiny", 2)
    assert httpx.get(f"{server.url}{ROUTER}/health").json() == {"status": "ok"}
    for route, content, status, code in (
        ("/v1/embeddings", b"{", 400, "invalid_json"),
        ("/v1/embeddings", [1], 400, "invalid_request"),
        ("/v1/embeddings", {"input": "a"}, 400, "invalid_request"),
        ("/v1/embeddings", {"input": "a", "model": 1}, 400, "invalid_request"),
        ("/embed", {"inputs": "a", "model": 1}, 400, "invalid_request"),
        ("/v1/embeddings", {"input": "a", "model": "gpt"}, 404, "model_not_found"),
        ("/v1/embeddings", {"input": "a", "model": "wide", "dimensions": 9}, 422, "invalid_dimensions"),
        ("/v1/embeddings", {"input": "a", "model": "tiny", "dimensions": 64}, 422, "invalid_dimensions"),
        ("/v1/embeddings", {"input": ["a"] * 17, "model": "tiny"}, 413, "too_many_inputs"),
        ("/embed", b" " * 10_000_001, 413, "body_too_large"),
    ):
        answer = server.post(ROUTER + route, content, server.key)
        assert (answer.status_code, error_of(answer)["code"]) == (status, code), (route, content)
    names = error_of(server.post(f"{ROUTER}/v1/embeddings", {"input": "a", "model": "x"}, server.key))["message"]
    assert "served: tiny, wide, text-embedding-3-small" in names


def test_info_of_several_models_lists_them_and_tells_of_each_by_any_name(server: Server) -> None:
    def info(path: str, **query: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {server.key}"}
        return httpx.get(f"{server.url}{path}/info", params=query, headers=headers, timeout=60)

    listed = info(ROUTER).json()["models"]
    assert [(card["id"], card["dims"][-1], card["max_tokens"], card["pooling"]) for card in listed] == [
        ("tiny", 32, MAX_TOKENS, "last"),
        ("wide", 64, MAX_TOKENS, "last"),
    ]
    for name, path in (("tiny", ""), ("wide", KEYED)):
        own = info(path)
        assert own.status_code == 200
        assert info(ROUTER, model=name).json() == own.json() == info(path, model=name).json()
    assert own.json()["pooling"] == "last"
    assert info(ROUTER, model="text-embedding-3-small").json() == own.json()
    for path, name in ((ROUTER, "gpt"), (ROUTER, ""), ("", "wide")):
        unknown = info(path, model=name)
        error = error_of(unknown)
        assert (unknown.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert f"model {name!r} is not served here; served: tiny" in error["message"]


def test_counters_come_out(server: Server) -> None:
    server.embed(SHORT)
    deadline = time.monotonic() + 90
    wanted = (
        "requests_total",
        "request_seconds",
        "tokens_total",
        "batch_texts",
        "queue_seconds",
        "forward_seconds",
    )
    while True:
        answer = httpx.get(server.metrics_url, timeout=30)
        if all(f"ray_f2llm_{name}" in answer.text for name in wanted):
            break
        assert time.monotonic() < deadline, answer.text
        time.sleep(1)
    assert answer.headers["content-type"].startswith("text/plain")
    counted = [line for line in answer.text.splitlines() if line.startswith("ray_f2llm_requests_total")]
    assert any('route="/embed"' in line and 'code="200"' in line for line in counted)
    assert all(line.removeprefix("# ").split(" ")[-1] for line in answer.text.splitlines() if "ray_f2llm_" in line)


def test_the_page_of_the_api_is_complete(server: Server) -> None:
    page = httpx.get(f"{server.url}/openapi.json").json()
    assert set(page["paths"]) >= {"/v1/embeddings", "/embed", "/v1/models", "/info", "/health"}
    for route in ("/v1/embeddings", "/embed"):
        post = page["paths"][route]["post"]
        assert set(post["responses"]) == {*map(str, (200, 400, 401, 404, 408, 413, 415, 422, 429, 503))}
        fields = post["requestBody"]["content"]["application/json"]["schema"]["properties"]
        assert {"dimensions", "prompt_name", "instruction", "truncate", "embedding_types"} <= set(fields)
        assert all("description" in fields[name] for name in ("dimensions", "embedding_types", "truncate"))
