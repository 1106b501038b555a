"""What one replica does, whatever carries its requests: admit, check, tokenise, batch, cut to dims."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from f2llm_ray.model.dims import Vectors, cut_dims
from f2llm_ray.model.encoder import Tokens
from f2llm_ray.run import Folder
from f2llm_ray.serve import api, limits
from f2llm_ray.serve.batcher import Batcher
from f2llm_ray.serve.engine import Engine
from f2llm_ray.serve.settings import Serving


class Replica:
    """One model in memory; made means ready, for it has encoded a text by then."""

    def __init__(self, model: str, settings: Serving) -> None:
        with Folder.at(model).as_local() as folder:
            self.engine = Engine(folder, tokens_per_pass=settings.batch_tokens)
        self.settings = settings
        self.info = self.engine.info
        self.created = int(time.time())
        self.in_flight = 0
        self.batcher = Batcher(self.engine.embed_tokens, settings.batch_tokens)
        self.vocabulary = int(self.engine.backbone.config.vocab_size)
        self.probe = self.engine.tokenize(["ready"])
        self.eos = int(self.probe[0][-1])
        self.engine.embed_tokens(self.probe)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Holds a place for one request, from before its body is read until it is answered.

        Raises:
            ApiError: 429 when all places are taken.
        """
        limits.check_load(self.in_flight, self.settings)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    async def embed(self, ask: api.Ask, given: api.Inputs, param: str) -> tuple[Vectors, int]:
        """Vectors of a request's inputs, cut to the dims it asked for, and the tokens they took.

        Args:
            ask: the request.
            given: its inputs.
            param: the field that they came in, for errors.

        Raises:
            ApiError: 413 or 422 for what the limits or the model do not allow.
        """
        dim = limits.check_dimensions(ask.dimensions, self.info)
        # In a thread: a megabyte of text takes the tokenizer long enough to hold up everyone on the event loop.
        tokens = await asyncio.to_thread(self._tokenize, ask, given, param)
        vectors = await self.batcher.embed(tokens)
        return cut_dims(vectors, dim), sum(map(len, tokens))

    async def check(self) -> None:
        """Encodes a short text, before all that wait.

        Raises:
            ApiError: 503 when that fails.
        """
        try:
            await self.batcher.embed(self.probe, first=True)
        except Exception as error:
            raise api.ApiError(503, "not_ready", f"the model cannot encode: {error}", retry_after=1) from error

    def _tokenize(self, ask: api.Ask, given: api.Inputs, param: str) -> list[Tokens]:
        prompt = limits.check_prompt(ask.prompt_name, ask.instruction, self.info)
        texts, ids = api.split(given)
        limits.check_inputs(texts or ids, self.settings, param)
        if ids:
            if prompt:
                message = f"{param}: a prompt goes before texts, not before token ids"
                raise api.ApiError(422, "invalid_prompt", message, param=param)
            tokens = limits.check_ids(ids, vocabulary=self.vocabulary, eos=self.eos, param=param)
        else:
            tokens = self.engine.tokenize(texts, prompt=prompt)
        longest = limits.longest_text(self.info, self.settings)
        return limits.check_lengths(tokens, max_tokens=longest, truncate=ask.truncate, param=param)
