"""One replica: it checks requests, tokenizes texts, embeds them in batches and cuts the vectors to dims."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel

from f2llm_ray import __version__
from f2llm_ray.data.tokens.tokenizer import template_of
from f2llm_ray.engine.engine_process import EngineProcess
from f2llm_ray.engine.text_engine import self_check
from f2llm_ray.model.dims import Vectors, cut_dims, quantize_vectors
from f2llm_ray.run.folder import Folder
from f2llm_ray.serve import api, limits
from f2llm_ray.serve.batcher import STALLED_S, Batcher
from f2llm_ray.serve.dialects import ROUTES, Embedded
from f2llm_ray.serve.guard import WatchedEngine, end_process
from f2llm_ray.serve.middleware import RequestPolicy
from f2llm_ray.serve.pieces import Pieces, pieces_of
from f2llm_ray.serve.search import SearchAnswer, SearchCorpus
from f2llm_ray.serve.served_model import ServedModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHORT = 500
"""Most characters (or token ids) of a request that is tokenized on the event loop: 0.13 ms, where waking a thread
alone takes half as long. A megabyte of text would hold up all other requests there."""
FRESH_S = 1.0
"""Seconds for which the engine is not asked again after it has embedded anything."""


class Replica:
    """One model in memory; it has encoded a text by the end of its construction, so that it is ready then.

    Raises:
        RunError: the model or the keys cannot be read, or its vectors differ from those stored in its folder.
    """

    def __init__(self, served: ServedModel) -> None:
        self.policy = RequestPolicy(served.access)
        self.settings, self.card, self.names = served.settings, served.card, served.names
        with Folder.at(served.uri).as_local() as folder:
            self.engine = EngineProcess(
                folder, tokens_per_pass=self.settings.batch_tokens, engine=self.settings.engine
            )
        if self.engine.calibration is not None:
            self_check(self.engine, self.engine.calibration, served.uri)
        self.model_info = self.engine.info
        self.corpus = None if served.corpus is None else SearchCorpus.load(Folder.at(served.corpus))
        self.slots = limits.RequestSlots(self.settings)
        self.watched = WatchedEngine(self.engine, end_process)
        self.batcher = Batcher(self.watched.embed_tokens, self.settings.batch_tokens, self.policy.metrics.batch)
        self.prefix, self.eos = template_of(self.engine.tokenizer)
        self._probing: asyncio.Task[Vectors] | None = None

    async def answer(self, route: str, body: bytes) -> api.Answer:
        """Answers POST to one of `dialects.ROUTES`.

        Raises:
            ApiError: anything wrong with the request.
        """
        return await ROUTES[route](self, body)

    async def forward(self, route: str, body: bytes) -> api.Answer | api.ApiError:
        """`answer` for a router: an error is returned, since Ray would wrap a raised one in a stack trace."""
        try:
            with self.slots.held(len(body)):
                return await self.answer(route, body)
        except api.ApiError as error:
            return error

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    def models(self) -> list[api.ModelCard]:
        """The model served here."""
        return [self.card]

    async def info(self, model: str | None) -> BaseModel:
        """Facts and limits, as an `api.Info`.

        Raises:
            ApiError: 404 for another model.
        """
        if model is not None:
            limits.check_model(model, self.names)
        space = self.model_info.space
        return api.Info(
            model=self.card.id,
            dims=self.model_info.dims,
            embedding_types=self.card.embedding_types,
            prompts=self.model_info.prompts,
            instructions=self.model_info.instructions,
            space=space and api.SpaceInfo(model=space.model, checksum=space.checksum),
            max_tokens=self.card.max_tokens,
            pooling=self.model_info.pooling,
            self_checked=self.engine.calibration is not None,
            types=self.card.types,
            limits=self.settings.model_copy(update={"max_tokens": self.card.max_tokens}),
            device=self.engine.device,
            engine=self.engine.engine,
            version=__version__,
        )

    async def check(self) -> None:
        """Passes while the engine works, and else has it encode a short text, one for all who ask at a time.

        Raises:
            ApiError: 503 when the engine fails or hangs.
        """
        if not self.batcher.stalled():
            if self.batcher.working() or time.monotonic() - self.batcher.succeeded < FRESH_S:
                return
            if self._probing is None or self._probing.done():
                self._probing = asyncio.create_task(self.batcher.embed(self.watched.probe, first=True))
            try:
                await asyncio.wait_for(asyncio.shield(self._probing), STALLED_S)
            except asyncio.TimeoutError:
                if self.batcher.working() and not self.batcher.stalled():  # not with the probe: that takes no time
                    return
            except Exception as error:
                raise api.ApiError(503, "not_ready", f"the model cannot encode: {error}", retry_after=1) from error
            else:
                return
        raise api.ApiError(503, "not_ready", "the engine hangs; another one is started", retry_after=5)

    async def check_health(self) -> None:
        """Ray Serve's own check; a replica whose engine fails or hangs ends, and Serve starts another."""
        try:
            await self.check()
        except api.ApiError as error:
            self.watched.leave(error.message)
            raise

    async def search(self, query_d: Vectors, top: int) -> SearchAnswer:
        """The nearest passages of the corpus at each dim.

        Raises:
            ApiError: 404 where there is no corpus.
        """
        if self.corpus is None:
            message = f"{self.card.id} is served without a corpus to search in"
            raise api.ApiError(404, "no_corpus", message, "model")
        nearest, hits = await asyncio.to_thread(self.corpus.search, query_d, self.model_info.dims, top)
        return SearchAnswer(model=self.card.id, rows=self.card.corpus_rows, nearest=nearest, hits=hits)

    async def embed(self, ask: api.EmbeddingOptions, given: api.Inputs, param: str) -> Embedded:
        """The vectors of texts or token lists.

        Raises:
            ApiError: anything wrong with them.
        """
        dim = limits.check_dimensions(ask.dimensions, self.model_info)
        types = limits.check_types(ask.embedding_types, self.card.embedding_types)
        texts, ids = api.split(given)
        if sum(map(len, texts)) + sum(map(len, ids)) + len(ask.instruction or "") <= SHORT:
            pieces = self._pieces(ask, texts, ids, param)
        else:
            pieces = await asyncio.to_thread(self._pieces, ask, texts, ids, param)
        vectors_nd = cut_dims(pieces.joined(await self.batcher.embed(pieces.tokens)), dim)
        forms = {kind: quantize_vectors(vectors_nd, kind, self.engine.ranges.get(dim)) for kind in types}
        long = {"truncated_inputs": pieces.truncated, "chunked_inputs": pieces.chunked}
        counted = {name: count for name, count in long.items() if count}
        return Embedded(forms, len(pieces.counts), pieces.size, counted)

    def _pieces(self, ask: api.EmbeddingOptions, texts: list[str], ids: list[list[int]], param: str) -> Pieces:
        long_text = limits.check_long_text(ask.truncate, ask.long_text, self.settings)
        prompt = limits.check_prompt(ask.prompt_name, ask.instruction, self.model_info)
        limits.check_inputs(texts or ids, self.settings, param)
        most, before = self.card.max_tokens, np.array([], dtype=np.uint32)
        if ids:
            if prompt:
                message = f"{param}: a prompt goes before texts, not before token ids"
                raise api.ApiError(422, "invalid_prompt", message, param=param)
            tokens = limits.check_ids(
                ids,
                self.settings,
                vocabulary=self.engine.vocabulary,
                prefix=self.prefix,
                eos=self.eos,
                param=param,
            )
        else:
            limits.check_prompted(prompt, len(texts), self.settings)
            if ask.instruction is not None or (prompt and long_text == "chunk"):
                before = self.engine.tokenize([prompt], max_tokens=most + 1)[0][len(self.prefix) : -1]
                limits.check_instruction(before, max_tokens=most - len(self.prefix) - 1, long_text=long_text)
            reach = None if long_text == "chunk" else most + 1
            tokens = self.engine.tokenize(texts, prompt=prompt, max_tokens=reach)
        if long_text == "refuse":
            limits.check_lengths(tokens, max_tokens=most, param=param)
        prefix = np.array(self.prefix, dtype=np.uint32)
        return pieces_of(tokens, long_text, most, prefix=prefix, prompt=before)
