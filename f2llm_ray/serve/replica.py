"""One replica: it checks requests, tokenizes texts, embeds them in batches and cuts the vectors to dims."""

from __future__ import annotations

import asyncio
import os

from pydantic import BaseModel

from f2llm_ray import __version__
from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.data.tokens.tokenizer import template_of
from f2llm_ray.engine.engine_process import EngineProcess
from f2llm_ray.engine.text_engine import self_check
from f2llm_ray.model.dims import EmbeddingType, Quantized, cut_dims, quantize_vectors
from f2llm_ray.run.folder import Folder
from f2llm_ray.serve import api, limits
from f2llm_ray.serve.batcher import Batcher
from f2llm_ray.serve.middleware import RequestPolicy
from f2llm_ray.serve.search import SearchAnswer, SearchCorpus, SearchRequest
from f2llm_ray.serve.served_model import ServedModel

SHORT = 500
"""Most characters (or token ids) of a request that is tokenized on the event loop: 0.13 ms, where waking a thread
alone takes half as long. A megabyte of text would hold up all other requests there."""


class Replica:
    """One model in memory; it has encoded a text by the end of its construction, so that it is ready then.

    Raises:
        RunError: the model or the keys cannot be read, or its vectors differ from those stored in its folder.
    """

    def __init__(self, served: ServedModel) -> None:
        self.policy = RequestPolicy(served.access)
        self.settings, self.card, self.names = served.settings, served.card, served.names
        with Folder.at(served.uri).as_local() as folder:
            self.engine = EngineProcess(folder, tokens_per_pass=self.settings.batch_tokens, gone=_leave)
        if self.engine.calibration is not None:
            self_check(self.engine, self.engine.calibration, served.uri)
        self.model_info = self.engine.info
        self.corpus = None if served.corpus is None else SearchCorpus.load(Folder.at(served.corpus))
        self.slots = limits.RequestSlots(self.settings)
        self.batcher = Batcher(self.engine.embed_tokens, self.settings.batch_tokens, self.policy.metrics.batch)
        self.vocabulary = self.engine.vocabulary
        self.probe = self.engine.tokenize(["ready"])
        self.prefix, self.eos = template_of(self.engine.tokenizer)
        self.engine.embed_tokens(self.probe)

    async def answer(self, route: str, body: bytes) -> api.Answer:
        """Answers POST /v1/embeddings, POST /embed or POST /search, which is the route.

        Raises:
            ApiError: anything wrong with the request.
        """
        if route == "/search":
            return await self._search(api.read_request(SearchRequest, body))
        if route == "/embed":
            plain = api.read_request(api.EmbedRequest, body)
            if plain.model is not None:
                limits.check_model(plain.model, self.names)
            forms, inputs, tokens = await self._embed(plain, plain.inputs, "inputs")
            named = plain.embedding_types is not None
            content = api.embed_answer(forms, named=named, encoding=plain.encoding_format)
        else:
            ask = api.read_request(api.EmbeddingsRequest, body)
            limits.check_model(ask.model, self.names)
            forms, inputs, tokens = await self._embed(ask, ask.input, "input")
            content = api.embeddings_answer(forms, model=self.card.id, tokens=tokens, encoding=ask.encoding_format)
        return api.Answer(content, self.card.id, inputs, tokens)

    async def forward(self, route: str, body: bytes) -> api.Answer | api.ApiError:
        """`answer` for a router: an error is returned, since Ray would wrap a raised one in a stack trace."""
        try:
            with self.slots.held():
                return await self.answer(route, body)
        except api.ApiError as error:
            return error

    def models(self) -> list[api.ModelCard]:
        """The model served here."""
        return [self.card]

    def info(self) -> BaseModel:
        """Facts and limits, as an `api.Info`."""
        return api.Info(
            model=self.card.id,
            dims=self.model_info.dims,
            embedding_types=self.card.embedding_types,
            prompts=self.model_info.prompts,
            instructions=self.model_info.instructions,
            max_tokens=self.card.max_tokens,
            self_checked=self.engine.calibration is not None,
            types=self.card.types,
            limits=self.settings,
            device=self.engine.device,
            version=__version__,
        )

    async def check(self) -> None:
        """Encodes a short text, ahead of all waiting requests.

        Raises:
            ApiError: 503 when that fails.
        """
        try:
            await self.batcher.embed(self.probe, first=True)
        except Exception as error:
            raise api.ApiError(503, "not_ready", f"the model cannot encode: {error}", retry_after=1) from error

    async def _search(self, ask: SearchRequest) -> api.Answer:
        limits.check_model(ask.model, self.names)
        if self.corpus is None:
            message = f"{self.card.id} is served without a corpus to search in"
            raise api.ApiError(404, "no_corpus", message, "model")
        query = api.EmbedRequest(inputs=ask.query, prompt_name=ask.prompt_name, truncate=True)
        forms, inputs, tokens = await self._embed(query, ask.query, "query")
        dims = self.model_info.dims
        nearest, hits = await asyncio.to_thread(self.corpus.search, forms["float"][0], dims, ask.top)
        found = SearchAnswer(model=self.card.id, rows=self.card.corpus_rows, nearest=nearest, hits=hits)
        return api.Answer(found.model_dump_json().encode(), self.card.id, inputs, tokens)

    async def _embed(
        self, ask: api.EmbeddingOptions, given: api.Inputs, param: str
    ) -> tuple[dict[EmbeddingType, Quantized], int, int]:
        """Vectors [n, ...] by type, the number n of inputs, and the number of their tokens."""
        dim = limits.check_dimensions(ask.dimensions, self.model_info)
        types = limits.check_types(ask.embedding_types, self.card.embedding_types)
        texts, ids = api.split(given)
        if sum(map(len, texts)) + sum(map(len, ids)) + len(ask.instruction or "") <= SHORT:
            tokens = self._tokenize(ask, texts, ids, param)
        else:
            tokens = await asyncio.to_thread(self._tokenize, ask, texts, ids, param)
        vectors_nd = cut_dims(await self.batcher.embed(tokens), dim)
        forms = {kind: quantize_vectors(vectors_nd, kind, self.engine.ranges.get(dim)) for kind in types}
        return forms, len(tokens), sum(map(len, tokens))

    def _tokenize(
        self, ask: api.EmbeddingOptions, texts: list[str], ids: list[list[int]], param: str
    ) -> list[Tokens]:
        prompt = limits.check_prompt(ask.prompt_name, ask.instruction, self.model_info)
        limits.check_inputs(texts or ids, self.settings, param)
        if ids:
            if prompt:
                message = f"{param}: a prompt goes before texts, not before token ids"
                raise api.ApiError(422, "invalid_prompt", message, param=param)
            tokens = limits.check_ids(
                ids, vocabulary=self.vocabulary, prefix=self.prefix, eos=self.eos, param=param
            )
        else:
            limits.check_prompted(prompt, len(texts), self.settings)
            if ask.instruction is not None:
                alone = self.engine.tokenize([prompt])
                limits.check_lengths(alone, max_tokens=self.card.max_tokens, truncate=False, param="instruction")
            tokens = self.engine.tokenize(texts, prompt=prompt)
        return limits.check_lengths(tokens, max_tokens=self.card.max_tokens, truncate=ask.truncate, param=param)


def _leave() -> None:
    """Ends a replica whose engine process is gone: Serve replaces it, and HAProxy uses another one meanwhile."""
    os._exit(1)
