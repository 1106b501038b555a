"""Batches across clients: while the engine embeds one batch, requests wait and become the next one.

Ray Serve's own `@serve.batch` fails a request that alone is larger than a batch, moves a request that does not fit
to the end of the queue, and waits a fixed time for more requests. This batcher never waits: an idle engine starts
at once, and a busy one takes its next batch in its own thread, while the event loop reads and answers requests.

Shapes: n texts, d dims.
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
"""Token lists, the future of their vectors [n, d], and when they came (`time.perf_counter`)."""
Observer = Callable[[int, int, float, float], None]
"""Called after each batch with its texts, its tokens, the seconds that its oldest request waited, and those in the
engine."""


class Batcher:
    """Joins the token lists of waiting requests, in the order they came, up to `batch_tokens`.

    A request with more tokens is a batch of its own; the engine cuts it into passes.
    """

    def __init__(
        self, embed: Callable[[Sequence[Tokens]], Vectors], batch_tokens: int, observe: Observer | None = None
    ) -> None:
        self._embed = embed
        self._observe = observe
        self._batch_tokens = batch_tokens
        self._waiting: deque[Request] = deque()
        # One thread: two passes at a time would only take turns on the same cores or GPU.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        # Guards `_waiting` and `_busy`: whether the thread will look at `_waiting` again.
        self._lock = threading.Lock()
        self._busy = False

    async def embed(self, tokens: Sequence[Tokens], *, first: bool = False) -> Vectors:
        """Vectors [n, d] of one request; one that is cancelled while it waits is not embedded.

        `first` goes ahead of all waiting requests, so that a health check does not time out under load.
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
        """Embeds batches until no request waits, in the engine's thread."""
        while batch := self._take():
            tokens = [ids for request, _, _ in batch for ids in request]
            started = time.perf_counter()
            found: Vectors | Exception
            try:
                found = self._embed(tokens)
            except Exception as error:  # noqa: BLE001 (the waiting requests raise it)
                found = error
            seconds = time.perf_counter() - started
            waited = started - min(came for _, _, came in batch)
            with suppress(RuntimeError):  # the loop is closed, and no request waits any more
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
        """The next batch; where it is empty the thread ends, and the next request starts it again."""
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
