"""Rough clients: whatever they send, the answer is one of the contract's, and the next client is served."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.endpoint import KEYED, MAX_QUEUED, TEXTS, Server, error_of

ALLOWED = {200, 400, 404, 413, 422}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "input": JSON | st.text() | st.lists(st.text(max_size=10), max_size=20) | st.lists(st.integers(-5, 500)),
        "inputs": JSON | st.text(),
        "model": SCALARS | st.just("tiny"),
        "dimensions": SCALARS | st.sampled_from([8, 16, 32]),
        "encoding_format": SCALARS | st.sampled_from(["float", "base64"]),
        "embedding_types": JSON | st.lists(st.sampled_from(["float", "int8", "binary", "ubinary"])),
        "prompt_name": SCALARS | st.just("query"),
        "instruction": SCALARS,
        "truncate": SCALARS,
        "user": SCALARS,
    },
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(route=st.sampled_from(["/v1/embeddings", "/embed"]), content=FIELDS | JSON | st.binary(max_size=50))
def test_any_body_gets_an_answer_of_the_table(server: Server, route: str, content: Any) -> None:
    answer = server.post(route, content)
    assert answer.status_code in ALLOWED, answer.text
    if answer.status_code != 200:
        assert error_of(answer)["message"]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff",
        "\u0000",
        "\u202e\u2066",
        "e\u0301" * 20,
        "\U0010ffff",
        "👩‍👩‍👧‍👦" * 10,
        "\ud7ff\ue000",
        "a\u200d" * 30,
        "\r\n\t",
    ],
)
def test_any_text_is_embedded_as_the_engine_does(server: Server, text: str) -> None:
    np.testing.assert_allclose(server.embed(text, truncate=True), server.engine.embed([text]), atol=1e-5)


def test_a_thousand_inputs_come_back_in_order(server: Server) -> None:
    texts = [f"{i} " + TEXTS[i % 4] for i in range(1000)]
    answer = server.post(f"{KEYED}/v1/embeddings", {"input": texts, "model": "wide"}, server.key)
    data = answer.json()["data"]
    assert [entry["index"] for entry in data] == list(range(1000))
    for i in (0, 499, 999):
        alone = server.post(f"{KEYED}/v1/embeddings", {"input": texts[i], "model": "wide"}, server.key).json()
        np.testing.assert_allclose(data[i]["embedding"], alone["data"][0]["embedding"], atol=1e-5)


def test_ten_megabytes(server: Server) -> None:
    """The most that the default limits take is read and judged by what it holds; a byte more is too large."""
    padded = b'{"inputs": "a"' + b" " * 9_999_985 + b"}"
    assert len(padded) == 10_000_000
    assert server.post(f"{KEYED}/embed", padded, server.key).status_code == 200
    nulls = b'{"inputs": [' + b"null," * 1_900_000 + b"null]}"
    assert server.post(f"{KEYED}/embed", nulls, server.key).status_code == 400
    large = server.post(f"{KEYED}/embed", padded + b" ", server.key)
    assert (large.status_code, error_of(large)["code"]) == (413, "body_too_large")
    long = {"inputs": "cat " * 100_000}
    refused = server.post(f"{KEYED}/embed", long, server.key)
    assert (refused.status_code, error_of(refused)["code"]) == (422, "too_many_tokens")
    assert server.post(f"{KEYED}/embed", {**long, "truncate": True}, server.key).status_code == 200
    assert server.embed("still here").shape == (1, 32)


def _connect(server: Server, announced: int) -> socket.socket:
    url = httpx.URL(server.url)
    connection = socket.create_connection((url.host, url.port or 80), timeout=60)
    head = (
        f"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {announced}\r\n\r\n"
    )
    connection.sendall(head.encode())
    return connection


def test_a_slow_client_keeps_nobody_waiting(server: Server) -> None:
    body = json.dumps({"inputs": "slowly"}).encode()
    slow = [_connect(server, len(body)) for _ in range(8)]
    for connection in slow:
        connection.sendall(body[:5])
    started = time.monotonic()
    assert server.embed(TEXTS[:2]).shape == (2, 32)
    assert time.monotonic() - started < 20
    for connection in slow:
        connection.sendall(body[5:])
        assert b"200 OK" in connection.recv(1000)
        connection.close()


def test_more_slow_bodies_than_places_refuse_nobody(server: Server) -> None:
    """A place is taken when the body is there."""
    slow = [_connect(server, 5000) for _ in range(MAX_QUEUED + 12)]
    for connection in slow:
        connection.sendall(b'{"inputs": ')
    answers = [server.post("/embed", {"inputs": f"meanwhile {n}"}) for n in range(5)]
    assert [answer.status_code for answer in answers] == [200] * 5
    for connection in slow:
        connection.close()


def test_an_instruction_before_many_inputs_is_bounded_together(server: Server) -> None:
    """20,000 characters before each of 16 inputs are three bodies' worth of a body of 20 kB."""
    started = time.monotonic()
    many = {"inputs": ["a"] * 16, "instruction": "b " * 10_000, "truncate": True}
    answer = server.post("/embed", many)
    assert (answer.status_code, error_of(answer)["code"]) == (413, "too_much_text")
    alone = server.post("/embed", {**many, "inputs": ["a"]})
    assert (alone.status_code, error_of(alone)["param"]) == (422, "instruction")
    assert time.monotonic() - started < 5


def test_clients_that_leave_hold_no_place(server: Server) -> None:
    """More disconnects than there are places, half of them in the middle of the body, half before the answer."""
    body = json.dumps({"inputs": ["the cat " * 20] * 16}).encode()
    for i in range(60):
        connection = _connect(server, len(body))
        connection.sendall(body if i % 2 else body[:10])
        connection.close()

    async def rush() -> list[int]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            posts = (client.post("/embed", json={"inputs": "after"}) for _ in range(32))
            return [answer.status_code for answer in await asyncio.gather(*posts)]

    deadline = time.monotonic() + 30
    while set(codes := asyncio.run(rush())) != {200}:
        assert time.monotonic() < deadline, codes
        time.sleep(0.5)
