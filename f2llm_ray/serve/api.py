"""The HTTP contract: what may be asked, what is answered, and the one form of an error.

`POST /v1/embeddings` keeps OpenAI's shape; `prompt_name`, `instruction` and `truncate` are ours. Answers are
written straight from the array of vectors, never through Python lists of floats.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, ValidationError, WrapValidator

from f2llm_ray.model.dims import Vectors
from f2llm_ray.serve.settings import Serving

RequestT = TypeVar("RequestT", bound=BaseModel)

TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
"""`type` of an error by its status; "invalid_request_error" for all others."""


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self) -> bytes:
        """The error body, the same for every route and status."""
        error = {
            "message": self.message,
            "type": TYPES.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return orjson.dumps({"error": error})


def _texts(value: Any, _: Callable[[Any], Any]) -> Any:
    if not isinstance(value, str) and not _all(value, str):
        raise ValueError("expected a string or a list of strings")
    return value


def _texts_or_tokens(value: Any, _: Callable[[Any], Any]) -> Any:
    if isinstance(value, str) or _all(value, str) or _all(value, int):
        return value
    if not _all(value, list) or not all(_all(ids, int) for ids in value):
        raise ValueError("expected a string, a list of strings, a list of token ids or a list of such lists")
    return value


def _all(value: Any, kind: type) -> bool:
    """Whether it is a list of nothing but this type; `true` is no int here."""
    return isinstance(value, list) and set(map(type, value)) <= {kind}


Inputs = str | list[str] | list[int] | list[list[int]]

# Checked by hand, one message for the whole field: pydantic would collect an error per item and union member,
# gigabytes of them for a body of 10 MB of nulls.
Texts = Annotated[str | list[str], WrapValidator(_texts)]
TextsOrTokens = Annotated[Inputs, WrapValidator(_texts_or_tokens)]


class Ask(BaseModel):
    """What both routes take. A key that is not known is refused: a misspelt `dimensions` must not pass unseen."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    dimensions: int | None = None
    """One of the dims the model was trained for (see /info); the whole vector when unset."""
    prompt_name: str | None = None
    """Puts this prompt of the model (see /info) before each text; "query" for search queries."""
    instruction: str | None = None
    """Embeds each text as a query with this instruction."""
    truncate: bool = False
    """Cut texts that are too long instead of refusing them."""


class EmbeddingsRequest(Ask):
    """Body of POST /v1/embeddings."""

    input: TextsOrTokens
    """Texts, or token ids of this model's own tokenizer."""
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None
    """Taken for OpenAI's sake; not used."""


class EmbedRequest(Ask):
    """Body of POST /embed."""

    inputs: Texts


class Embedding(BaseModel):
    """One vector: a list of floats, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens counted with prompt and EOS."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """Answer of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class ModelCard(BaseModel):
    """A model that can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """Unix time when this replica loaded it."""
    owned_by: str = "f2llm_ray"


class ModelList(BaseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Info(BaseModel):
    """Answer of GET /info."""

    model: str
    dims: tuple[int, ...]
    """The values `dimensions` may take."""
    prompts: dict[str, str]
    instructions: bool
    """Whether `instruction` may be given."""
    max_tokens: int
    """Longest text taken whole, EOS included."""
    limits: Serving
    device: str
    version: str


class Health(BaseModel):
    """Answer of GET /health."""

    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field at fault."""
    code: str


class ErrorBody(BaseModel):
    """Body of every answer that is not 200."""

    error: ErrorDetail


def read_request(kind: type[RequestT], body: bytes) -> RequestT:
    """The request in a body.

    Raises:
        ApiError: 400 for anything that is not JSON of this shape, 422 for a value not among those allowed.
    """
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {error}") from None
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)[0]
    param = str(details["loc"][0]) if details["loc"] else None
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "extra_forbidden":
        message = f"unknown field; allowed: {', '.join(kind.model_fields)}"
    text = f"{param}: {message}" if param else "the body must be a JSON object"
    if details["type"] == "literal_error":
        raise ApiError(422, "invalid_value", text, param=param)
    raise ApiError(400, "invalid_request", text, param=param)


def split(given: Inputs) -> tuple[list[str], list[list[int]]]:
    """The inputs one by one, as texts or as token lists; a lone text or token list is a list of one."""
    if isinstance(given, str):
        return [given], []
    if given and isinstance(given[0], int):
        return [], [[token for token in given if isinstance(token, int)]]
    texts = [text for text in given if isinstance(text, str)]
    return texts, [ids for ids in given if isinstance(ids, list)]


def embeddings_answer(vectors: Vectors, *, model: str, tokens: int, encoding: Literal["float", "base64"]) -> bytes:
    """The body of an `EmbeddingsAnswer`, each vector in the form asked for."""
    rows = np.ascontiguousarray(vectors, dtype="<f4")
    values = [base64.b64encode(row).decode("ascii") for row in rows] if encoding == "base64" else list(rows)
    answer = {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": value} for i, value in enumerate(values)],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def embed_answer(vectors: Vectors) -> bytes:
    """The body of POST /embed's answer: a list of lists."""
    return orjson.dumps(np.ascontiguousarray(vectors), option=orjson.OPT_SERIALIZE_NUMPY)
