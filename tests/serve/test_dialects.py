"""The shapes of TEI and Cohere, long texts, packed bodies and browsers, over HTTP."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.serve.endpoint import BROWSER, KEYED, ROUTER, TEXTS, Server, error_of
from tests.tiny import MAX_TOKENS

SHORT = TEXTS[:4]
LONG = "the cat sat on the mat and looked at the rain. " * 40


def query_and_passages(server: Server) -> np.ndarray[Any, Any]:
    prompt = server.engine.info.prompts["query"]
    return server.engine.embed(SHORT) @ server.engine.embed([SHORT[0]], prompt=prompt)[0]


def test_scores_are_cosines(server: Server) -> None:
    vectors = server.engine.embed(SHORT)
    ask = {"inputs": {"source_sentence": SHORT[0], "sentences": SHORT[1:]}}
    for parameters in ({}, {"truncate": True, "truncation_direction": "Right", "prompt_name": None}):
        answer = server.post("/similarity", {**ask, "parameters": parameters})
        np.testing.assert_allclose(answer.json(), vectors[1:] @ vectors[0], atol=1e-5)
    prompted = server.engine.embed(SHORT, prompt=server.engine.info.prompts["query"])
    answer = server.post("/similarity", {**ask, "parameters": {"prompt_name": "query", "truncate": True}})
    np.testing.assert_allclose(answer.json(), prompted[1:] @ prompted[0], atol=1e-5)

    scores = query_and_passages(server)
    order = np.argsort(-scores).tolist()
    tei = {"return_text": True, "truncate": True, "truncation_direction": "Right"}
    ranks = server.post("/rerank", {"query": SHORT[0], "texts": SHORT, **tei}).json()
    assert [rank["index"] for rank in ranks] == order
    assert [rank["text"] for rank in ranks] == [SHORT[index] for index in order]
    np.testing.assert_allclose([rank["score"] for rank in ranks], scores[order], atol=1e-5)

    ask = {"model": "tiny", "query": SHORT[0], "documents": SHORT, "top_n": 2}
    for route in ("/v1/rerank", "/v2/rerank", f"{ROUTER}/v2/rerank"):
        key = server.key if route.startswith(ROUTER) else None
        found = server.post(route, ask, key).json()
        assert [result["index"] for result in found["results"]] == order[:2]
        scored = [result["relevance_score"] for result in found["results"]]
        np.testing.assert_allclose(scored, scores[order[:2]], atol=1e-5)


def test_a_pair_that_has_no_scores_says_which_part(server: Server) -> None:
    for given, message in (
        ({"source_sentence": "a", "sentences": []}, "inputs.sentences: it is empty"),
        ({"source_sentence": "a", "sentences": ["b", ""]}, "inputs.sentences[1]: it is empty"),
        ({"source_sentence": "", "sentences": ["b"]}, "inputs.source_sentence[0]: it is empty"),
    ):
        answer = server.post("/similarity", {"inputs": given})
        assert (answer.status_code, error_of(answer)["message"]) == (422, message)
    wrong = server.post("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]}, "parameters": []})
    assert (wrong.status_code, error_of(wrong)["param"]) == (400, "parameters")


def test_coheres_embed(server: Server) -> None:
    ask = {"model": "tiny", "texts": SHORT, "input_type": "search_query", "embedding_types": ["float", "ubinary"]}
    found = server.post("/v2/embed", ask).json()
    wanted = server.engine.embed(SHORT, prompt=server.engine.info.prompts["query"])
    np.testing.assert_allclose(found["embeddings"]["float"], wanted, atol=1e-5)
    assert found["embeddings"]["ubinary"] == np.packbits(wanted > 0, axis=1).tolist()
    assert (found["texts"], found["response_type"]) == (SHORT, "embeddings_by_type")
    plain = server.post("/v2/embed", {**ask, "input_type": "clustering", "output_dimension": 8}).json()
    np.testing.assert_allclose(plain["embeddings"]["float"], server.engine.embed(SHORT, dim=8), atol=1e-5)
    untrained = server.post("/v2/embed", {**ask, "output_dimension": 7})
    assert (untrained.status_code, error_of(untrained)["param"]) == (422, "output_dimension")
    refused = server.post("/v2/embed", {**ask, "embedding_types": ["uint8"]})
    assert (refused.status_code, error_of(refused)["param"]) == (422, "embedding_types")


def test_teis_fields_and_tokens(server: Server) -> None:
    tei = {"inputs": SHORT, "normalize": True, "truncate": True, "truncation_direction": "Right"}
    np.testing.assert_allclose(server.post("/embed", tei).json(), server.engine.embed(SHORT), atol=1e-5)
    raw = server.post("/embed", {**tei, "normalize": False})
    assert (raw.status_code, error_of(raw)["param"]) == (400, "normalize")
    (tokens,) = server.post("/tokenize", {"inputs": SHORT[0]}).json()
    assert [token["id"] for token in tokens] == server.engine.tokenize([SHORT[0]])[0].tolist()
    assert [token["special"] for token in tokens] == [False] * (len(tokens) - 1) + [True]
    assert "".join(SHORT[0][token["start"] : token["stop"]] for token in tokens) == SHORT[0]


def test_routes_that_are_not_here_say_so(server: Server) -> None:
    for route in ("/embed_sparse", "/embed_all", "/predict", "/v1/chat/completions"):
        answer = server.post(route, {"inputs": "a"})
        assert (answer.status_code, error_of(answer)["code"]) == (404, "not_supported")


def test_a_long_text_is_refused_cut_or_taken_in_parts(server: Server) -> None:
    ask = {"model": "tiny", "input": ["short", LONG]}
    refused = server.post("/v1/embeddings", ask)
    assert (refused.status_code, error_of(refused)["code"]) == (422, "too_many_tokens")
    assert "input[1]" in error_of(refused)["message"]

    cut = server.post("/v1/embeddings", {**ask, "long_text": "truncate"})
    assert cut.json()["usage"]["truncated_inputs"] == 1
    assert cut.headers["x-truncated-inputs"] == "1"
    np.testing.assert_allclose(
        [entry["embedding"] for entry in cut.json()["data"]], server.engine.embed(ask["input"]), atol=1e-5
    )

    parts = server.post("/v1/embeddings", {**ask, "long_text": "chunk", "dimensions": 16})
    assert (parts.json()["usage"]["chunked_inputs"], parts.headers["x-chunked-inputs"]) == (1, "1")
    (ids,) = server.engine.tokenize([LONG])
    pieces = np.array_split(ids[:-1], -(-(len(ids) - 1) // (MAX_TOKENS - 1)))
    tokens = [np.append(piece, ids[-1]) for piece in pieces]
    mean = sum(
        len(piece) * vector for piece, vector in zip(tokens, server.engine.embed_tokens(tokens), strict=True)
    )
    wanted = mean[:16] / np.linalg.norm(mean[:16])
    np.testing.assert_allclose(parts.json()["data"][1]["embedding"], wanted, atol=1e-5)
    np.testing.assert_allclose(server.embed("short", long_text="chunk"), server.engine.embed(["short"]), atol=1e-5)

    assert server.embed(LONG, long_text="chunk", instruction="Find.").shape == (1, 32)
    narrow = server.post("/embed", {"inputs": LONG, "long_text": "chunk", "instruction": "Find it. " * 5})
    assert (narrow.status_code, error_of(narrow)["code"]) == (422, "too_many_tokens")
    both = server.post("/embed", {"inputs": "a", "truncate": True, "long_text": "chunk"})
    assert (both.status_code, error_of(both)["param"]) == (422, "long_text")


def test_a_text_that_is_none_is_named(server: Server) -> None:
    body = json.dumps({"model": "tiny", "input": ["fine", "cut \ud83d"]}).encode()
    answer = server.post("/v1/embeddings", body)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_text")
    assert error_of(answer)["message"].startswith("input[1]: ")


def test_a_million_unknown_fields_are_refused_at_once(server: Server) -> None:
    many = {**{f"field {n}": 1 for n in range(60_000)}, "inputs": "a"}
    answer = server.post(f"{KEYED}/embed", many, server.key)
    assert (answer.status_code, answer.elapsed.total_seconds() < 5) == (400, True)
    assert error_of(answer)["message"].startswith("field 0: unknown field")


def test_packed_bodies(server: Server) -> None:
    def send(content: bytes, encoding: str = "gzip") -> httpx.Response:
        return httpx.post(
            f"{server.url}/embed", content=content, headers={"Content-Encoding": encoding}, timeout=60
        )

    body = json.dumps({"inputs": SHORT}).encode()
    np.testing.assert_allclose(send(gzip.compress(body)).json(), server.engine.embed(SHORT), atol=1e-5)
    bomb = send(gzip.compress(b" " * 50_000_000))
    assert (bomb.status_code, error_of(bomb)["code"]) == (413, "body_too_large")
    for content, encoding, status, code in (
        (gzip.compress(body)[:-9], "gzip", 400, "invalid_encoding"),
        (body, "gzip", 400, "invalid_encoding"),
        (gzip.compress(body) + gzip.compress(b" "), "gzip", 400, "invalid_encoding"),
        (body, "br", 415, "unsupported_encoding"),
    ):
        refused = send(content, encoding)
        assert (refused.status_code, error_of(refused)["code"]) == (status, code)


def test_browsers_of_named_origins_may_ask(server: Server) -> None:
    def preflight(origin: str, route: str) -> httpx.Response:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        return httpx.options(f"{server.url}{route}/embed", headers={"Origin": origin, **asked}, timeout=60)

    allowed = preflight(BROWSER, KEYED)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, BROWSER)
    assert "access-control-allow-origin" not in preflight("https://elsewhere.example", KEYED).headers
    assert preflight(BROWSER, "").status_code == 405  # where no origin is named
    headers = {"Origin": BROWSER}
    refused = httpx.post(f"{server.url}{KEYED}/embed", json={"inputs": "a"}, headers=headers, timeout=60)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, BROWSER)
    assert "x-truncated-inputs" in refused.headers["access-control-expose-headers"]


def test_token_ids_are_refused_where_texts_alone_are_taken(server: Server) -> None:
    answer = server.post(f"{KEYED}/v1/embeddings", {"model": "wide", "input": [1, 2]}, server.key)
    assert (answer.status_code, error_of(answer)["code"]) == (422, "token_ids_refused")
    assert "check_embedding_ctx_length=False" in error_of(answer)["message"]


@pytest.mark.parametrize("kind", ["int8", "ubinary"])
def test_stock_clients_read_the_numbers_of_any_type(server: Server, kind: str) -> None:
    """OpenAI's client asks for base64 and reads float32 from it."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        given = client.embeddings.create(model="tiny", input=SHORT, extra_body={"embedding_types": [kind]})
    plain = server.post("/embed", {"inputs": SHORT, "embedding_types": [kind]}).json()[kind]
    assert [entry.embedding for entry in given.data] == plain
    several = {"model": "tiny", "input": SHORT, "embedding_types": [kind, "float"], "encoding_format": "base64"}
    packed = server.post("/v1/embeddings", several).json()["data"][0]["embeddings"][kind]
    assert np.frombuffer(base64.b64decode(packed), {"int8": "i1", "ubinary": "u1"}[kind]).tolist() == plain[0]
