"""The contract without a server: every refusal of the table, and answers that say the same in each form."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from f2llm_ray.data.tokens.tokenizer import load_tokenizer
from f2llm_ray.model.checkpoint import ModelInfo
from f2llm_ray.model.dims import cut_dims, quantize_vectors
from f2llm_ray.serve import api, limits
from f2llm_ray.serve.api import ApiError, EmbeddingsRequest, EmbedRequest
from f2llm_ray.serve.dialects import ROUTES
from f2llm_ray.serve.settings import Access, Serving
from tests.tiny import tiny_model

INFO = ModelInfo(
    name="tiny", dims=(8, 16, 32), max_tokens=64, prompts={"query": "Q: ", "topic": "T: "}, instructions=True
)
PLAIN = ModelInfo(name="plain", dims=(8,), max_tokens=64, prompts={"query": ""}, instructions=False)
LONG = np.arange(17, dtype=np.uint32)
TEXTS_ALONE = Serving(token_ids=False)
LIMITS = Serving(max_inputs=3, max_tokens=16, max_body_bytes=1024, max_queued=2)


def read(content: Any, kind: type[EmbeddingsRequest | EmbedRequest] = EmbeddingsRequest) -> Any:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return api.read_request(kind, body)


REFUSALS: dict[str, tuple[Callable[[], Any], int, str, str | None]] = {
    "no json": (lambda: read(b'{"input": '), 400, "invalid_json", None),
    "empty body": (lambda: read(b""), 400, "invalid_json", None),
    "not utf-8": (lambda: read(b'{"input": "\xff", "model": "m"}'), 400, "invalid_json", None),
    "half a surrogate pair": (lambda: read(b'{"input": "\\ud800", "model": "m"}'), 400, "invalid_text", "input"),
    "not an object": (lambda: read([1]), 400, "invalid_request", None),
    "no input": (lambda: read({"model": "m"}), 400, "invalid_request", "input"),
    "no model": (lambda: read({"input": "a"}), 400, "invalid_request", "model"),
    "input a number": (lambda: read({"input": 1, "model": "m"}), 400, "invalid_request", "input"),
    "input mixed": (lambda: read({"input": ["a", 1], "model": "m"}), 400, "invalid_request", "input"),
    "input of booleans": (lambda: read({"input": [True], "model": "m"}), 400, "invalid_request", "input"),
    "input of floats": (lambda: read({"input": [1.5], "model": "m"}), 400, "invalid_request", "input"),
    "input too deep": (lambda: read({"input": [[[1]]], "model": "m"}), 400, "invalid_request", "input"),
    "dimensions a string": (
        lambda: read({"input": "a", "model": "m", "dimensions": "8"}),
        400,
        "invalid_request",
        "dimensions",
    ),
    "misspelt": (lambda: read({"input": "a", "model": "m", "dimension": 8}), 400, "invalid_request", "dimension"),
    "ids to /embed": (lambda: read({"inputs": [1]}, EmbedRequest), 400, "invalid_request", "inputs"),
    "encoding": (
        lambda: read({"input": "a", "model": "m", "encoding_format": "hex"}),
        422,
        "invalid_value",
        "encoding_format",
    ),
    "model": (lambda: limits.check_model("gpt", ["tiny"]), 404, "model_not_found", "model"),
    "body": (lambda: limits.check_body(1025, LIMITS), 413, "body_too_large", None),
    "too many": (lambda: limits.check_inputs(["a"] * 4, LIMITS, "input"), 413, "too_many_inputs", "input"),
    "none": (lambda: limits.check_inputs([], LIMITS, "input"), 422, "empty_input", "input"),
    "empty text": (lambda: limits.check_inputs(["a", ""], LIMITS, "input"), 422, "empty_input", "input"),
    "empty ids": (lambda: limits.check_inputs([[1], []], LIMITS, "input"), 422, "empty_input", "input"),
    "dims": (lambda: limits.check_dimensions(24, INFO), 422, "invalid_dimensions", "dimensions"),
    "dims 0": (lambda: limits.check_dimensions(0, INFO), 422, "invalid_dimensions", "dimensions"),
    "prompt": (lambda: limits.check_prompt("nope", None, INFO), 422, "invalid_prompt", "prompt_name"),
    "prompt twice": (lambda: limits.check_prompt("query", "Find", INFO), 422, "invalid_prompt", "instruction"),
    "no instructions": (lambda: limits.check_prompt(None, "Find", PLAIN), 422, "invalid_prompt", "instruction"),
    "id too high": (lambda: ids([[0, 10]]), 422, "invalid_token", "input"),
    "id negative": (lambda: ids([[3], [-1]]), 422, "invalid_token", "input"),
    "too long": (
        lambda: limits.check_lengths([LONG], max_tokens=16, param="input"),
        422,
        "too_many_tokens",
        "input",
    ),
    "ids not taken": (
        lambda: limits.check_ids([[1]], TEXTS_ALONE, vocabulary=10, prefix=[], eos=9, param="input"),
        422,
        "token_ids_refused",
        "input",
    ),
    "truncate and not": (
        lambda: limits.check_long_text(False, "truncate", LIMITS),
        422,
        "invalid_value",
        "long_text",
    ),
    "no room": (
        lambda: limits.check_instruction(LONG, max_tokens=17, long_text="truncate"),
        422,
        "too_many_tokens",
        "instruction",
    ),
    "little room": (
        lambda: limits.check_instruction(LONG, max_tokens=30, long_text="chunk"),
        422,
        "too_many_tokens",
        "instruction",
    ),
    "full": (lambda: fill(3), 429, "overloaded", None),
    "full of bytes": (lambda: fill_bytes([2000, 7000]), 429, "overloaded", None),
}


def ids(given: list[list[int]]) -> list[Any]:
    return limits.check_ids(given, LIMITS, vocabulary=10, prefix=[], eos=9, param="input")


def fill_bytes(sizes: list[int]) -> None:
    """Of 8 bodies of 1,024 bytes at most."""
    slots = limits.RequestSlots(LIMITS)
    with slots.held(10_000):  # one alone is never too large: its own limit was checked
        pass
    with ExitStack() as stack:
        for size in sizes:
            stack.enter_context(slots.held(size))


def fill(requests: int) -> None:
    slots = limits.RequestSlots(LIMITS)
    with ExitStack() as stack:
        for _ in range(requests):
            stack.enter_context(slots.held(10))
    assert (slots.taken, slots.bytes) == (0, 0)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    act, status, code, param = REFUSALS[name]
    with pytest.raises(ApiError) as caught:
        act()
    body = json.loads(caught.value.body())["error"]
    assert (caught.value.status, body["code"], body["param"]) == (status, code, param)
    assert body["message"]
    assert body["type"] == ("rate_limit_error" if status == 429 else "invalid_request_error")
    assert caught.value.headers == ({"Retry-After": "1"} if status == 429 else {})


def test_messages_name_what_is_allowed() -> None:
    with pytest.raises(ApiError, match="allowed: 8, 16, 32"):
        limits.check_dimensions(24, INFO)
    with pytest.raises(ApiError, match="it has: query, topic"):
        limits.check_prompt("nope", None, INFO)
    with pytest.raises(ApiError, match="served: tiny"):
        limits.check_model("gpt", ["tiny"])
    with pytest.raises(ApiError, match=r"allowed: .*dimensions"):
        read({"input": "a", "model": "m", "dimension": 8})
    with pytest.raises(ApiError, match="long_text: truncate cuts it, and chunk takes the mean"):
        limits.check_lengths([LONG], max_tokens=16, param="inputs")
    with pytest.raises(ApiError, match=r"texts\[0\]: more than 16 tokens, the most of a text; truncate cuts it$"):
        limits.check_lengths([LONG], max_tokens=16, param="texts")
    with pytest.raises(ApiError, match=r"input\[1\]: token id -1 is not in 0\.\.9"):
        ids([[3], [-1]])


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b'{"input": ["a", "\\ud83d"]}', "input", r"^input\[1\]: half of a surrogate pair"),
        (b'{"inputs": {"sentences": ["\\ud83d"]}}', "inputs", r"^inputs\.sentences\[0\]: half of"),
        (b'{"\\ud83d": "\\ud83d"}', "\ufffd", "^\ufffd: half of a surrogate pair"),
        (b'"\\ud83d"', None, "^the body: half of a surrogate pair"),
        (b'{"input": "\\ud83d", "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", None, "the body is not JSON"),
        (b'{"input": "\xe4"}', None, "found byte 0xe4 at byte 12, expected UTF-8"),
    ],
)
def test_a_body_that_is_no_text_says_where(body: bytes, param: str | None, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        read(body)
    assert caught.value.status == 400
    assert json.loads(caught.value.body())["error"]["param"] == param


def test_an_unknown_field_with_null_asks_for_nothing() -> None:
    """Some clients send every field that they know, with null for what their user left out."""
    given = read({"input": "a", "model": "m", "input_type": None, "encoding_format": None, "dimensions": None})
    assert given == read({"input": "a", "model": "m"})
    with pytest.raises(ApiError, match="input_type: unknown field"):
        read({"input": "a", "model": "m", "other": None, "input_type": "query"})


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (1, "a whole number"),
        (["a", None], r"null at \[1\]"),
        ([None, "a"], r"null at \[0\]"),
        (["a", 1], r"a whole number at \[1\]"),
        ([1, 2, True], r"a boolean at \[2\]"),
        ([1.5], r"a number at \[0\]"),
        ([[1], "a"], r"a string at \[1\]"),
        ([[1], [2, None]], r"null at \[1\]\[1\]"),
        ([[[1]]], r"a list at \[0\]\[0\]"),
        ([{"text": "a"}], r"an object at \[0\]"),
    ],
)
def test_the_item_of_another_kind_is_named(given: Any, found: str) -> None:
    with pytest.raises(ApiError, match=f"^input: found {found}, expected a string, a list of strings"):
        read({"input": given, "model": "m"})
    if not (isinstance(given, list) and isinstance(given[0], int | list)):
        with pytest.raises(ApiError, match=f"^inputs: found {found}, expected a string or a list of strings"):
            read({"inputs": given}, EmbedRequest)


def test_what_passes() -> None:
    for given in ("a", ["a", "b"], [1, 2], [[1], [2, 3]], []):
        assert read({"input": given, "model": "m"}).input == given
    limits.check_body(1024, LIMITS)
    fill(2)
    limits.check_inputs(["a"] * 3, LIMITS, "input")
    assert limits.check_dimensions(None, INFO) == 32
    assert limits.check_dimensions(8, INFO) == 8
    assert limits.longest_text(INFO, LIMITS) == 16
    assert limits.longest_text(INFO, Serving()) == 64


@pytest.mark.parametrize("origin", ["https://example.org/", "example.org", "https://Example.org", "https://a/b"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError, match=f"found '{origin}', which no browser sends"):
        Access(cors_origins=(origin,))
    Access(cors_origins=("*", "https://example.org", "http://localhost:3000", "null", "http://[::1]:8080"))


def test_prompts() -> None:
    assert limits.check_prompt(None, None, INFO) == ""
    assert limits.check_prompt("query", None, INFO) == "Q: "
    assert limits.check_prompt(None, "Find it.", INFO) == "Instruct: Find it.\nQuery: "
    assert limits.check_prompt(None, "", INFO) == ""


def test_eos_ends_every_token_list_once() -> None:
    assert [list(tokens) for tokens in ids([[1, 2], [1, 2, 9]])] == [[1, 2, 9], [1, 2, 9]]


def test_split() -> None:
    assert api.split("a") == (["a"], [])
    assert api.split(["a", "b"]) == (["a", "b"], [])
    assert api.split([1, 2]) == ([], [[1, 2]])
    assert api.split([[1], [2]]) == ([], [[1], [2]])
    assert api.split([]) == ([], [])


def test_base64_and_float_say_the_same() -> None:
    vectors = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    for given in (vectors, vectors[:, :5], vectors[::2]):
        forms = {"float": quantize_vectors(given, "float")}
        floats = json.loads(api.embeddings_answer(forms, model="m", tokens=7, encoding="float"))
        coded = json.loads(api.embeddings_answer(forms, model="m", tokens=7, encoding="base64"))
        assert floats["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
        assert [entry["index"] for entry in floats["data"]] == list(range(len(given)))
        for row, plain, packed in zip(given, floats["data"], coded["data"], strict=True):
            np.testing.assert_array_equal(np.array(plain["embedding"], dtype=np.float32), row)
            np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed["embedding"]), "<f4"), row)
        assert json.loads(api.embed_answer(forms)) == [entry["embedding"] for entry in floats["data"]]
        api.EmbeddingsAnswer.model_validate(floats)
        api.EmbeddingsAnswer.model_validate(coded)


def test_cutting_a_unit_vector_is_cutting_the_raw_one() -> None:
    raw = np.random.default_rng(1).standard_normal((4, 32)).astype(np.float32)
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    short = raw[:, :8] / np.linalg.norm(raw[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(cut_dims(unit, 8), short, atol=1e-6)
    assert cut_dims(unit, 32) is unit


def test_a_huge_wrong_body_is_refused_at_once() -> None:
    with pytest.raises(ApiError, match=r"found null at \[0\], expected a string"):
        read(b'{"model": "m", "input": [' + b"null," * 1_000_000 + b"null]}")


def test_token_ids_get_the_templates_ends_once() -> None:
    whole = [[7, 1, 2, 9]]
    for given in (whole, [[1, 2, 9]], [[7, 1, 2]], [[1, 2]]):
        found = limits.check_ids(given, LIMITS, vocabulary=10, prefix=[7], eos=9, param="input")
        assert [ids.tolist() for ids in found] == whole


def test_token_ids_are_the_text(tmp_path: Path) -> None:
    from f2llm_ray.engine.engine import Engine

    engine = Engine(tiny_model(tmp_path / "model"))
    texts = ["The cat sat.", "猫が眠る", "Кошка"]
    with_eos = [[int(token) for token in ids] for ids in engine.tokenize(texts)]
    vocabulary, eos = engine.vocabulary, with_eos[0][-1]
    for given in (with_eos, [ids[:-1] for ids in with_eos]):
        tokens = limits.check_ids(given, LIMITS, vocabulary=vocabulary, prefix=[], eos=eos, param="input")
        np.testing.assert_array_equal(engine.embed_tokens(tokens), engine.embed(texts))


def test_many_tokens_hold_up_nobody(tmp_path: Path) -> None:
    """The event loop, on which all requests are read and answered, goes on while a million characters are cut."""
    folder = tiny_model(tmp_path / "model")
    card = SimpleNamespace(id="tiny")
    replica: Any = SimpleNamespace(
        settings=Serving(), model_info=INFO, names=("tiny",), card=card, tokenizer=load_tokenizer(folder)
    )
    body = json.dumps({"inputs": ["the cat sat " * 4000] * 20}).encode()

    async def longest_stall() -> tuple[float, float]:
        started, worst = time.monotonic(), 0.0
        answering = asyncio.create_task(ROUTES["/tokenize"](replica, body))
        while not answering.done():
            before = time.monotonic()
            await asyncio.sleep(0.001)
            worst = max(worst, time.monotonic() - before)
        assert (await answering).inputs == 20
        return worst, time.monotonic() - started

    worst, whole = asyncio.run(longest_stall())
    assert worst < whole / 2
