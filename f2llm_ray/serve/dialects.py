"""The routes that take texts, in the shapes of OpenAI, TEI and Cohere: what each is asked and what it answers.

One table, `ROUTES`, for the replica that answers them, the router that forwards them, and the pages that describe
them. A score of two texts is the cosine of their vectors.

Shapes: n texts, d dims.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol
from uuid import uuid4

import numpy as np
import orjson
from pydantic import Field, WrapValidator

from f2llm_ray.model.checkpoint import ModelInfo
from f2llm_ray.model.dims import EmbeddingType, Quantized, Vectors
from f2llm_ray.serve import api, limits
from f2llm_ray.serve.search import SearchAnswer, SearchRequest
from f2llm_ray.serve.settings import Serving

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZED_CHARS = 1_000_000
"""Most characters of a request to /tokenize, whose answer is some twenty times as large."""


@dataclass(frozen=True)
class Embedded:
    """The vectors of a request, and what is counted of it."""

    forms: dict[EmbeddingType, Quantized]
    """[n, ...] by type."""
    inputs: int
    tokens: int
    long: dict[str, int] = field(default_factory=dict)
    """As in `api.Answer`."""

    @property
    def vectors_nd(self) -> Vectors:
        """Those of type float."""
        return self.forms["float"]


class Embedder(Protocol):
    """What a route needs of a replica."""

    card: api.ModelCard
    names: tuple[str, ...]
    settings: Serving

    @property
    def model_info(self) -> ModelInfo:
        """The model's facts."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""

    async def embed(self, ask: api.EmbeddingOptions, given: api.Inputs, param: str) -> Embedded:
        """The vectors of texts or token lists; raises ApiError for a wrong request."""

    async def search(self, query_d: Vectors, top: int) -> SearchAnswer:
        """The nearest passages of the replica's corpus; raises ApiError where it has none."""


# OpenAI's /v1/embeddings, and the short form that TEI has as well.


async def _embeddings(replica: Embedder, ask: api.EmbeddingsRequest) -> api.Answer:
    found = await replica.embed(ask, ask.input, "input")
    content = api.embeddings_answer(
        found.forms,
        model=replica.card.id,
        tokens=found.tokens,
        encoding=ask.encoding_format,
        long=found.long,
    )
    return _answer(replica, content, found)


async def _embed(replica: Embedder, ask: api.EmbedRequest) -> api.Answer:
    found = await replica.embed(ask, ask.inputs, "inputs")
    named = ask.embedding_types is not None
    content = api.embed_answer(found.forms, named=named, encoding=ask.encoding_format)
    return _answer(replica, content, found)


async def _search(replica: Embedder, ask: SearchRequest) -> api.Answer:
    query = api.EmbedRequest(inputs=ask.query, prompt_name=ask.prompt_name, truncate=True)
    found = await replica.embed(query, ask.query, "query")
    nearest = await replica.search(found.vectors_nd[0], ask.top)
    return _answer(replica, nearest.model_dump_json().encode(), found)


# TEI's other routes.


def _pair(value: Any, _: Callable[[Any], Any]) -> Any:
    if not isinstance(value, dict) or set(value) != {"source_sentence", "sentences"}:
        raise ValueError('expected {"source_sentence": text, "sentences": [texts]}')
    source, sentences = value["source_sentence"], value["sentences"]
    if not isinstance(source, str) or not isinstance(sentences, list) or set(map(type, sentences)) - {str}:
        raise ValueError("expected a string as source_sentence and a list of strings as sentences")
    return value


class SimilarityParameters(api.RequestBody):
    """`parameters` of POST /similarity."""

    prompt_name: str | None = None
    """A prompt of the model before each text."""
    truncate: bool | None = None
    truncation_direction: api.Right = "right"


class SimilarityRequest(api.RequestBody):
    """Body of POST /similarity."""

    inputs: Annotated[dict[str, Any], WrapValidator(_pair)]
    """`{"source_sentence": text, "sentences": [texts]}`."""
    model: str | None = None
    parameters: SimilarityParameters = SimilarityParameters()


async def _similarity(replica: Embedder, ask: SimilarityRequest) -> api.Answer:
    source, sentences = ask.inputs["source_sentence"], ask.inputs["sentences"]
    params, name = ("inputs.source_sentence", "inputs.sentences"), ask.parameters.prompt_name
    scores_n, found = await _scores(replica, source, sentences, params, ask.parameters.truncate, (name, name))
    return _answer(replica, orjson.dumps(scores_n, option=orjson.OPT_SERIALIZE_NUMPY), found)


class RerankRequest(api.RequestBody):
    """Body of POST /rerank."""

    query: str
    texts: api.Texts
    model: str | None = None
    raw_scores: bool = False
    """A field of TEI's that has no effect: scores are cosines either way."""
    return_text: bool = False
    truncate: bool | None = None
    truncation_direction: api.Right = "right"


class Rank(api.Body):
    """A text of POST /rerank, the best first."""

    index: int
    score: float
    text: str | None = None


async def _rerank(replica: Embedder, ask: RerankRequest) -> api.Answer:
    texts, _ = api.split(ask.texts)
    scores_n, found = await _scores(replica, ask.query, texts, ("query", "texts"), ask.truncate, _sides(replica))
    ranks = [
        {"index": index, "score": float(scores_n[index])} | ({"text": texts[index]} if ask.return_text else {})
        for index in _best(scores_n)
    ]
    return _answer(replica, orjson.dumps(ranks), found)


class TokenizeRequest(api.RequestBody):
    """Body of POST /tokenize."""

    inputs: api.Texts
    model: str | None = None
    prompt_name: str | None = None
    add_special_tokens: bool = True


class Token(api.Body):
    """A token, and the characters of the text that it stands for."""

    id: int
    text: str
    special: bool
    start: int
    stop: int


async def _tokenize(replica: Embedder, ask: TokenizeRequest) -> api.Answer:
    texts, _ = api.split(ask.inputs)
    limits.check_inputs(texts, replica.settings, "inputs")
    prompt = limits.check_prompt(ask.prompt_name, None, replica.model_info)
    characters = sum(len(prompt) + len(text) for text in texts)
    if characters > TOKENIZED_CHARS:
        message = f"inputs: {characters:,} characters, at most {TOKENIZED_CHARS:,} are tokenized at a time"
        raise api.ApiError(413, "too_much_text", message, "inputs")
    # Not on the event loop, where all other requests would wait for it.
    content, tokens = await asyncio.to_thread(_tokens, replica.tokenizer, prompt, texts, ask.add_special_tokens)
    return api.Answer(content, replica.card.id, len(texts), tokens)


def _tokens(tokenizer: Tokenizer, prompt: str, texts: Sequence[str], special: bool) -> tuple[bytes, int]:
    """The answer with the tokens of texts, and their number."""
    encodings = tokenizer.encode_batch([prompt + text for text in texts], add_special_tokens=special)
    content = [
        [
            {"id": token, "text": name, "special": bool(special), "start": start, "stop": stop}
            for token, name, special, (start, stop) in zip(
                encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True
            )
        ]
        for encoding in encodings
    ]
    return orjson.dumps(content), sum(map(len, content))


# Cohere's routes.

INPUT_TYPES = {"search_query": "query", "search_document": "document"}
"""The prompts of the model that stand for a Cohere input_type, where it has them; other types take none."""


class CohereEmbedRequest(api.RequestBody):
    """Body of POST /v2/embed."""

    model: str
    texts: api.Texts
    input_type: Literal["search_query", "search_document", "classification", "clustering"]
    embedding_types: api.EmbeddingTypes = Field(default=["float"])
    output_dimension: int | None = None
    truncate: Literal["NONE", "END"] = "END"


class CohereEmbeddings(api.Body):
    """Answer of POST /v2/embed."""

    id: str
    response_type: Literal["embeddings_by_type"] = "embeddings_by_type"
    embeddings: dict[str, list[list[float]]]
    texts: list[str]
    meta: dict[str, Any]


async def _cohere_embed(replica: Embedder, ask: CohereEmbedRequest) -> api.Answer:
    texts, _ = api.split(ask.texts)
    options = api.EmbedRequest(
        inputs=texts,
        dimensions=limits.check_dimensions(ask.output_dimension, replica.model_info, "output_dimension"),
        prompt_name=_prompt(replica, INPUT_TYPES.get(ask.input_type)),
        truncate=ask.truncate == "END",
        embedding_types=ask.embedding_types,
    )
    found = await replica.embed(options, texts, "texts")
    content = {
        "id": str(uuid4()),
        "response_type": "embeddings_by_type",
        "embeddings": found.forms,
        "texts": texts,
        "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": found.tokens}, **found.long},
    }
    return _answer(replica, orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), found)


class CohereRerankRequest(api.RequestBody):
    """Body of POST /v2/rerank and /v1/rerank, which Jina's clients send too."""

    model: str
    query: str
    documents: api.Texts
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False


class CohereRanks(api.Body):
    """Answer of POST /v2/rerank."""

    id: str
    model: str
    results: list[dict[str, Any]]
    """`{"index", "relevance_score"}` of each document, the best first, and `document` where asked for."""
    usage: api.Usage


async def _cohere_rerank(replica: Embedder, ask: CohereRerankRequest) -> api.Answer:
    texts, _ = api.split(ask.documents)
    scores_n, found = await _scores(replica, ask.query, texts, ("query", "documents"), True, _sides(replica))
    results = [
        {"index": index, "relevance_score": float(scores_n[index])}
        | ({"document": {"text": texts[index]}} if ask.return_documents else {})
        for index in _best(scores_n)[: ask.top_n]
    ]
    usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens, **found.long}
    content = {"id": str(uuid4()), "model": replica.card.id, "results": results, "usage": usage}
    return _answer(replica, orjson.dumps(content), found)


# What the routes share.


def _answer(replica: Embedder, content: bytes, found: Embedded) -> api.Answer:
    return api.Answer(content, replica.card.id, found.inputs, found.tokens, found.long)


def _prompt(replica: Embedder, name: str | None) -> str | None:
    return name if name in replica.model_info.prompts else None


def _sides(replica: Embedder) -> tuple[str | None, str | None]:
    """The prompts of queries and of passages."""
    return _prompt(replica, "query"), _prompt(replica, "document")


async def _scores(
    replica: Embedder,
    query: str,
    texts: Sequence[str],
    params: tuple[str, str],
    truncate: bool | None,
    prompts: tuple[str | None, str | None],
) -> tuple[Vectors, Embedded]:
    """Cosines [n] of texts with a query, each side with a prompt of its own, and the counts of both."""
    asking, telling = (api.EmbedRequest(inputs="", prompt_name=name, truncate=truncate) for name in prompts)
    asked, found = await asyncio.gather(
        replica.embed(asking, query, params[0]), replica.embed(telling, list(texts), params[1])
    )
    long = {name: asked.long.get(name, 0) + found.long.get(name, 0) for name in {*asked.long, *found.long}}
    both = Embedded(found.forms, asked.inputs + found.inputs, asked.tokens + found.tokens, long)
    scores_n: Vectors = found.vectors_nd @ asked.vectors_nd[0]
    return scores_n, both


def _best(scores_n: Vectors) -> list[int]:
    """The places of scores, the largest first, equal ones in their order."""
    return [int(index) for index in np.argsort(-scores_n, kind="stable")]


@dataclass(frozen=True)
class Route:
    """A route that takes texts."""

    ask: type[api.RequestBody]
    answer: Any
    """What /docs shows."""
    summary: str
    work: Callable[[Any, Any], Awaitable[api.Answer]]

    async def __call__(self, replica: Embedder, body: bytes) -> api.Answer:
        """Answers a request.

        Raises:
            ApiError: anything wrong with it.
        """
        ask = api.read_request(self.ask, body)
        model: str | None = getattr(ask, "model", None)
        if model is not None:
            limits.check_model(model, replica.names)
        return await self.work(replica, ask)

    @property
    def names_model(self) -> bool:
        """Whether a request must name a model."""
        return self.ask.model_fields["model"].is_required()


_VECTORS: Any = list[list[float]] | dict[str, Any]
_RERANK = "Texts by the cosine of their vectors with that of a query"
_COHERE_RERANK = Route(
    CohereRerankRequest, CohereRanks, f"{_RERANK}, in the shape of Cohere and Jina", _cohere_rerank
)
ROUTES: dict[str, Route] = {
    "/v1/embeddings": Route(api.EmbeddingsRequest, api.EmbeddingsAnswer, "Vectors in OpenAI's shape", _embeddings),
    "/embed": Route(
        api.EmbedRequest, _VECTORS, "A list of vectors, or such lists by type where types are named", _embed
    ),
    "/search": Route(
        SearchRequest, SearchAnswer, "The nearest passages of the model's corpus at each of its dims", _search
    ),
    "/similarity": Route(
        SimilarityRequest, list[float], "Cosines of sentences with one, in TEI's shape", _similarity
    ),
    "/rerank": Route(RerankRequest, list[Rank], f"{_RERANK}, in TEI's shape", _rerank),
    "/tokenize": Route(TokenizeRequest, list[list[Token]], "The tokens of texts, in TEI's shape", _tokenize),
    "/v2/embed": Route(CohereEmbedRequest, CohereEmbeddings, "Vectors in Cohere's shape", _cohere_embed),
    "/v1/rerank": _COHERE_RERANK,
    "/v2/rerank": _COHERE_RERANK,
}

ABSENT = {
    "/embed_sparse": "this model makes dense vectors alone; POST /embed gives them",
    "/embed_all": "this model makes one vector of a text, not one of each token; POST /embed gives it",
    "/predict": "this model makes vectors, not classes; POST /embed gives them",
    "/v1/completions": "this model makes vectors, not text; POST /v1/embeddings gives them",
    "/v1/chat/completions": "this model makes vectors, not text; POST /v1/embeddings gives them",
}
"""Routes that clients may try, and why they are not here."""


def absent(route: str) -> api.ApiError:
    """The answer to a route of `ABSENT`."""
    return api.ApiError(404, "not_supported", f"{route}: {ABSENT[route]}")
