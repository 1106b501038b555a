"""The HTTP contract: the bodies of requests, answers and errors.

`POST /v1/embeddings` has OpenAI's fields, and also `prompt_name`, `instruction`, `truncate` and
`embedding_types`. Answers are written straight from the array of vectors, never through Python lists of floats.

Shapes: n inputs.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_args

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, field_validator, model_validator

from f2llm_ray.model.dims import EMBEDDING_TYPES, EmbeddingType, Quantized
from f2llm_ray.serve.settings import LongText, Serving

RequestT = TypeVar("RequestT", bound=BaseModel)
NAME_CHARS = 100
"""Most characters of a client's word that an error repeats."""
KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}
"""What JSON may hold, as errors call it."""
SURROGATE = re.compile("[\ud800-\udfff]")

TYPES = {
    401: "authentication_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
"""`type` of an error by its status; "invalid_request_error" for all others."""


class ApiError(Exception):
    """An answer other than 200. All its parts are arguments of `Exception`, so that it can be pickled."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(status, code, message, param, retry_after)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def __str__(self) -> str:
        return self.message

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
        raise ValueError(f"found {_misfit(value, {str})}, expected a string or a list of strings")
    return value


def _texts_or_tokens(value: Any, _: Callable[[Any], Any]) -> Any:
    if isinstance(value, str) or _all(value, str) or _all(value, int):
        return value
    if not _all(value, list) or not all(_all(ids, int) for ids in value):
        problem = f"found {_misfit(value, {str, int, list})}, expected a string, a list of strings, "
        raise ValueError(f"{problem}a list of token ids or a list of such lists")
    return value


def _misfit(value: Any, kinds: set[type]) -> str:
    """What is wrong in a value that is no list of one of these kinds alone, and where in it: "null at [3]"."""
    if not isinstance(value, list):
        return KINDS[type(value)]
    kind = type(value[0])
    wrong = (n for n, item in enumerate(value) if type(item) is not kind or kind not in kinds)
    place = next(wrong, None)
    if place is None:  # lists, one of which is not of token ids
        place = next(n for n, ids in enumerate(value) if not _all(ids, int))
        inner = next(n for n, item in enumerate(value[place]) if type(item) is not int)
        return f"{KINDS[type(value[place][inner])]} at [{place}][{inner}]"
    return f"{KINDS[type(value[place])]} at [{place}]"


def _all(value: Any, kind: type) -> bool:
    """Whether a value is a list of this type alone; a bool does not count as an int."""
    return isinstance(value, list) and set(map(type, value)) <= {kind}


Encoding = Literal["float", "base64"]
Right = Literal["right", "Right"]
"""TEI's word for which end a text loses; the other one is not offered."""
Inputs = str | list[str] | list[int] | list[list[int]]

# Checked by hand, with one message for the whole field: pydantic would collect an error per item and union member,
# which takes gigabytes for a body of 10 MB of nulls.
Texts = Annotated[str | list[str], WrapValidator(_texts)]
TextsOrTokens = Annotated[Inputs, WrapValidator(_texts_or_tokens)]


EmbeddingTypes = Annotated[list[EmbeddingType], Field(max_length=len(EMBEDDING_TYPES))]


class Body(BaseModel):
    """A body of the API; /docs shows the docstrings of its fields."""

    model_config = ConfigDict(use_attribute_docstrings=True)


def _takes_null(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


class RequestBody(Body):
    """A request, in which null stands for the default of a field unless it has a meaning of its own there.

    An unknown field is refused, so that a misspelt `dimensions` is noticed; with null it asks for nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        fields = cls.model_fields.items()
        kept = {name for name, field in fields if field.is_required() or _takes_null(field.annotation)}
        return {name: value for name, value in content.items() if value is not None or name in kept}


class EmbeddingOptions(RequestBody):
    """The fields that both routes have."""

    dimensions: int | None = None
    """One of the dims the model was trained for (see /info); the whole vector when unset."""
    prompt_name: str | None = None
    """Puts this prompt of the model (see /info) before each text; "query" for search queries."""
    instruction: str | None = None
    """Embeds each text as a query with this instruction."""
    truncate: bool | None = None
    """true cuts texts that are too long, as `long_text: truncate` does; false refuses them."""
    long_text: LongText | None = None
    """For texts that are too long: "refuse", "truncate", or "chunk", the mean of the vectors of their parts
    weighed by their tokens; what /info says when unset."""
    encoding_format: Encoding = "float"
    """"base64" packs each vector's little-endian bytes: float32, int8 or uint8; in `embedding` of /v1/embeddings
    always float32, as OpenAI's clients read it."""
    embedding_types: EmbeddingTypes | None = None
    """Forms of the vectors, "float" when unset; int8 needs ranges stored with the model (see /info)."""


class EmbeddingsRequest(EmbeddingOptions):
    """Body of POST /v1/embeddings."""

    input: TextsOrTokens
    """Texts, or token ids of this model's own tokenizer."""
    model: str
    user: str | None = None
    """A field of OpenAI's that has no effect here."""


class EmbedRequest(EmbeddingOptions):
    """Body of POST /embed."""

    inputs: Texts
    model: str | None = None
    """The default model when unset."""
    normalize: bool = True
    """A field of TEI's; vectors have length 1 always."""
    truncation_direction: Right = "right"
    """A field of TEI's; texts lose their end."""

    @field_validator("normalize")
    @classmethod
    def _normalized(cls, normalize: bool) -> bool:
        if not normalize:
            raise ValueError("vectors have length 1 here; false cannot be had")
        return normalize


Numbers = list[float] | list[int] | str


class Embedding(Body):
    """One vector, as a list of numbers or as base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: Numbers
    """In the first of the `embedding_types`."""
    embeddings: dict[EmbeddingType, Numbers] | None = None
    """In each of the `embedding_types`, where several were asked for."""


class Usage(Body):
    """Tokens counted with prompt and EOS."""

    prompt_tokens: int
    total_tokens: int
    truncated_inputs: int | None = None
    """Inputs that were cut, where any was."""
    chunked_inputs: int | None = None
    """Inputs of several parts, where any was."""


class EmbeddingsAnswer(Body):
    """Answer of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


Scores = dict[str, dict[str, dict[str, float | tuple[float, float]]]]
Types = dict[str, dict[int, dict[EmbeddingType, float]]]


class ModelCard(Body):
    """A model that a request may name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """Unix time when it was made."""
    owned_by: str = "f2llm_ray"
    aliases: tuple[str, ...] = ()
    """Other names that `model` may give."""
    dims: tuple[int, ...]
    """The values `dimensions` may take."""
    max_tokens: int
    """Tokens of the longest text that is not cut, EOS included."""
    pooling: str
    """How a text's vector comes of its tokens: last, mean or cls."""
    embedding_types: tuple[EmbeddingType, ...]
    """The values `embedding_types` may hold."""
    parameters: int | None = None
    scores: Scores = {}
    """Scores in the run's report, by evaluation set, dim and metric; confidence intervals are [low, high]."""
    types: Types = {}
    """nDCG@10 of shorter and smaller vectors, by retrieval set, dim and vector type."""
    corpus_rows: int = 0
    """Passages that POST /search and the page at / search in; 0 without a corpus."""


class ModelList(Body):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class SpaceInfo(Body):
    """A model in whose space the served one ends."""

    model: str
    checksum: str
    """Of its facts, tokenizer and weights; that of the served model's own folder is another one."""


class Info(Body):
    """Answer of GET /info where one model is served, and of GET /info?model=NAME."""

    model: str
    dims: tuple[int, ...]
    """The values `dimensions` may take."""
    embedding_types: tuple[EmbeddingType, ...]
    """The values `embedding_types` may hold."""
    prompts: dict[str, str]
    instructions: bool
    """Whether `instruction` may be given."""
    space: SpaceInfo | None = None
    """The other model whose index of passages this one's queries may search, where it was taught to end there."""
    max_tokens: int
    """Tokens of the longest text that is not cut, EOS included."""
    pooling: str
    """How a text's vector comes of its tokens: last, mean or cls."""
    self_checked: bool
    """Whether the vectors were compared with those stored in the model's folder."""
    types: Types
    """nDCG@10 of shorter and smaller vectors, by retrieval set of the run, dim and vector type."""
    limits: Serving
    device: str
    engine: str
    """What computes the vectors: torch, onnx or openvino."""
    version: str


class Health(Body):
    """Answer of GET /health."""

    status: Literal["ok"] = "ok"


class ErrorDetail(Body):
    """The parts of an error."""

    message: str
    type: str
    param: str | None
    """The field at fault."""
    code: str


class ErrorBody(Body):
    """Body of every answer that is not 200."""

    error: ErrorDetail


@dataclass(frozen=True)
class Answer:
    """A successful answer: its body, and the facts for the access log."""

    content: bytes
    model: str
    inputs: int
    tokens: int
    long: Mapping[str, int] = field(default_factory=dict)
    """How many inputs were cut or taken in parts, by a name such as `truncated_inputs`; only what is not 0."""

    @property
    def headers(self) -> dict[str, str]:
        """The same as headers, for answers that are a list of vectors."""
        return {f"x-{name.replace('_', '-')}": str(count) for name, count in self.long.items()}


def internal_error(error: Exception) -> ApiError:
    """The answer to a request that failed through no fault of the client."""
    return ApiError(
        500, "internal_error", f"the request failed here ({type(error).__name__}); see the replica's log"
    )


def read_json(body: bytes) -> Any:
    """The JSON of a body.

    Raises:
        ApiError: 400 when it is not JSON, or a text in it is none.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        problem = str(error)
    path = _bad_text(body)
    if path is not None:
        message = f"{_place(path)}: half of a surrogate pair, which is no character; the text was cut within one"
        raise ApiError(400, "invalid_text", message, param=_place(path[:1]) if path else None)
    try:
        body.decode()
    except UnicodeDecodeError as error:
        found = f"found byte 0x{body[error.start]:02x} at byte {error.start + 1}, expected UTF-8"
        raise ApiError(400, "invalid_json", f"the body is not JSON: {found}") from None
    raise ApiError(400, "invalid_json", f"the body is not JSON: {problem}")


def _bad_text(body: bytes) -> list[str | int] | None:
    """The path to the text or the name that holds half of a surrogate pair, such as ["input", 3]."""
    if b"\\ud" not in body and b"\\uD" not in body:
        return None
    try:
        return _half_pair(json.loads(body))
    except (ValueError, RecursionError):
        return None


def _half_pair(content: Any) -> list[str | int] | None:
    if isinstance(content, str):
        return [] if SURROGATE.search(content) else None
    items = (
        enumerate(content) if isinstance(content, list) else content.items() if isinstance(content, dict) else ()
    )
    for name, value in items:
        inner = [] if isinstance(name, str) and SURROGATE.search(name) else _half_pair(value)
        if inner is not None:
            return [name, *inner]
    return None


def _place(path: Sequence[str | int]) -> str:
    """A path within a body as errors have it: `input[3]`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    return SURROGATE.sub("\ufffd", "".join(parts).removeprefix(".")[:NAME_CHARS]) or "the body"


def read_request(kind: type[RequestT], body: bytes) -> RequestT:
    """The request in a body.

    Raises:
        ApiError: 400 for a body that is not JSON or has wrong fields, 422 for a value that is not allowed.
    """
    content = read_json(body)
    if isinstance(content, dict):
        # Not by pydantic, which makes an error for each of them: a body may hold a million.
        given = (name for name, value in content.items() if value is not None)
        unknown = next((name for name in given if name not in kind.model_fields), None)
        if unknown is not None:
            text = f"{unknown[:NAME_CHARS]}: unknown field; allowed: {', '.join(kind.model_fields)}"
            raise ApiError(400, "invalid_request", text, param=unknown[:NAME_CHARS])
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)[0]
    param = str(details["loc"][0]) if details["loc"] else None
    message = details["msg"].removeprefix("Value error, ")
    text = f"{param}: {message}" if param else "the body must be a JSON object"
    if details["type"] == "literal_error":
        raise ApiError(422, "invalid_value", text, param=param)
    raise ApiError(400, "invalid_request", text, param=param)


def split(given: Inputs) -> tuple[list[str], list[list[int]]]:
    """The inputs as texts and as token lists, of which one is empty; a single input becomes a list of one."""
    if isinstance(given, str):
        return [given], []
    if given and isinstance(given[0], int):
        return [], [[token for token in given if isinstance(token, int)]]
    texts = [text for text in given if isinstance(text, str)]
    return texts, [ids for ids in given if isinstance(ids, list)]


def embeddings_answer(
    forms: Mapping[EmbeddingType, Quantized],
    *,
    model: str,
    tokens: int,
    encoding: Encoding = "float",
    long: Mapping[str, int] | None = None,
) -> bytes:
    """The body of an `EmbeddingsAnswer`: vectors [n, ...] by type, the tokens of all inputs, and `Answer.long`."""
    coded = {kind: _coded(rows, encoding) for kind, rows in forms.items()}
    leading = next(iter(forms.values()))
    # OpenAI's clients ask for base64 by themselves and read float32 from it, whatever the type.
    first = _coded(leading if encoding == "float" else leading.astype("<f4"), encoding)
    data = [{"object": "embedding", "index": i, "embedding": value} for i, value in enumerate(first)]
    if len(coded) > 1:
        for i, entry in enumerate(data):
            entry["embeddings"] = {kind: values[i] for kind, values in coded.items()}
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, **(long or {})}
    answer = {"object": "list", "data": data, "model": model, "usage": usage}
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def embed_answer(
    forms: Mapping[EmbeddingType, Quantized], *, named: bool = False, encoding: Encoding = "float"
) -> bytes:
    """The body of POST /embed's answer: a list of vectors, or with `named` such a list by type."""
    answer: Any = {kind: rows if encoding == "float" else _coded(rows, encoding) for kind, rows in forms.items()}
    if not named:
        (answer,) = answer.values()
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def _coded(rows: Quantized, encoding: Encoding) -> list[Any]:
    if encoding == "float":
        return list(rows)
    return [base64.b64encode(row).decode("ascii") for row in rows]
