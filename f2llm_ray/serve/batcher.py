"""Batches across clients: while the engine works on one batch, the next one gathers.

Ray Serve's own `@serve.batch` fails a request that is larger than the batch by itself, puts a request that did not
fit at the end of the queue, and waits a set time for more. This one never waits: an idle engine starts at once, a
busy one takes its next batch itself, without waiting for an event loop that is reading and answering requests.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.model.dims import Vectors

Request = tuple[Sequence[Tokens], "asyncio.Future[Vectors]", float]
"""Token lists, where their vectors go, and when they came."""
Observer = Callable[[int, int, float, float], None]
"""Told of each batch: texts, tokens, seconds that its oldest request waited, seconds in the engine."""


class Batcher:
    """Joins the token lists of waiting requests, in the order they came, up to a token budget.

    A request above the budget is a batch of its own; the engine cuts it into passes.
    """

    def __init__(
        self, embed: Callable[[Sequence[Tokens]], Vectors], batch_tokens: int, observe: Observer | None = None
    ) -> None:
        self._embed = embed
        self._observe = observe
        self._batch_tokens = batch_tokens
        self._waiting: deque[Request] = deque()
        # One thread: two passes at a time would share the same cores or GPU and only take turns.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        # Held over what waits, and whether the thread will look there again.
        self._lock = threading.Lock()
        self._busy = False

    async def embed(self, tokens: Sequence[Tokens], *, first: bool = False) -> Vectors:
        """Vectors [n, d] of one request; a caller that is cancelled while waiting costs the engine nothing.

        Args:
            tokens: the request's token lists.
            first: go before all that wait, so that a health check does not time out under load.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Vectors] = loop.create_future()
        with self._lock:
            (self._waiting.appendleft if first else self._waiting.append)((tokens, future, time.perf_counter()))
            idle, self._busy = not self._busy, True
        if idle:
            self._thread.submit(self._work, loop)
        return await future

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """Runs batches until none waits, in the engine's thread."""
        while batch := self._take():
            tokens = [ids for request, _, _ in batch for ids in request]
            started = time.perf_counter()
            found: Vectors | Exception
            try:
                found = self._embed(tokens)
            except Exception as error:  # noqa: BLE001 (it belongs to those who wait)
                found = error
            seconds = time.perf_counter() - started
            waited = started - min(came for _, _, came in batch)
            with suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(self._deliver, batch, found, waited, seconds)

    def _deliver(self, batch: list[Request], found: Vectors | Exception, waited: float, seconds: float) -> None:
        if isinstance(found, Exception):
            for _, future, _ in batch:
                if not future.done():
                    future.set_exception(found)
            return
        start = 0
        for request, future, _ in batch:
            if not future.done():
                future.set_result(found[start : start + len(request)])
            start += len(request)
        if self._observe is not None:
            tokens = sum(len(ids) for request, _, _ in batch for ids in request)
            self._observe(len(found), tokens, waited, seconds)

    def _take(self) -> list[Request]:
        """The next batch; with none the thread is free, and the next request starts it again."""
        batch: list[Request] = []
        size = 0
        with self._lock:
            while self._waiting:
                request, future, came = self._waiting[0]
                length = sum(map(len, request))
                if batch and size + length > self._batch_tokens:
                    break
                self._waiting.popleft()
                if not future.done():
                    batch.append((request, future, came))
                    size += length
            self._busy = bool(batch)
        return batch
