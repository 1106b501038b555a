"""Batches across clients: while the engine embeds one batch, requests wait and become the next one.

Ray Serve's own `@serve.batch` fails a request that alone is larger than a batch, moves a request that does not fit
to the end of the queue, and waits a fixed time for more requests. This batcher never waits: an idle engine starts
at once, and a busy one takes its next batch in its own thread, while the event loop reads and answers requests.

Requests take turns: a large one is cut over many batches, and goes behind those that came meanwhile after each of
its shares. A batch is small enough to be done in `TURN_S`, by the measured pace, so that a short text waits for
about one such turn beside a request of any size.

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
from dataclasses import dataclass, field

import numpy as np

from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.model.dims import Vectors

Observer = Callable[[int, int, float, float], None]
"""Called after each batch with its texts, its tokens, the seconds that its oldest request waited, and those in the
engine."""

TURN_S = 0.25
"""Longest that a batch should take: half of what the next request then waits for."""
FULL_BATCH = 1024
"""Tokens from which on a batch uses a machine well, however slow it is (`engine.encode.FULL_PASS`)."""
SHARES = 4
"""Requests above the budget that go on in one batch."""
MEASURED = 256
"""Fewest tokens of a batch whose pace says anything; the rest of a shorter one is overhead."""
STALLED_S = 10.0
"""No batch is called stalled before this many seconds,"""
SLOWER = 10.0
"""nor before this many times what the pace says: another process may use the machine too."""
FIRST_PACE = 100.0
"""Tokens a second taken for granted until a batch was measured."""


@dataclass(eq=False)
class Request:
    """What waits: the token lists, the future of their vectors [n, d], and how far the engine is with them."""

    tokens: Sequence[Tokens]
    future: asyncio.Future[Vectors]
    came: float
    """`time.perf_counter` when it came."""
    taken: int = 0
    """Texts in this or an earlier batch."""
    found: list[Vectors] = field(default_factory=list)


@dataclass(frozen=True)
class Share:
    """Texts of one request in one batch."""

    request: Request
    start: int
    stop: int

    @property
    def tokens(self) -> Sequence[Tokens]:
        """Their token lists."""
        return self.request.tokens[self.start : self.stop]


class Batcher:
    """Joins the token lists of waiting requests into batches of at most `batch_tokens`.

    A text that is longer than a batch is one by itself. Where a batch fails, its requests are tried one by one, so
    that a text which the engine cannot embed fails its own request alone.
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
        self._pace = 0.0
        self._running: tuple[float, int] | None = None
        self.succeeded = time.monotonic()
        """When a batch last succeeded, by `time.monotonic`."""

    def working(self) -> bool:
        """Whether a batch is in the engine."""
        return self._running is not None

    def stalled(self) -> bool:
        """Whether the batch in the engine takes far longer than its tokens explain."""
        running = self._running
        if running is None:
            return False
        started, tokens = running
        return time.monotonic() - started > max(STALLED_S, SLOWER * tokens / (self._pace or FIRST_PACE))

    async def embed(self, tokens: Sequence[Tokens], *, first: bool = False) -> Vectors:
        """Vectors [n, d] of one request; what is cancelled while it waits is not embedded.

        `first` goes ahead of all waiting requests, so that a health check does not time out under load.
        """
        loop = asyncio.get_running_loop()
        request = Request(tokens, loop.create_future(), time.perf_counter())
        with self._lock:
            (self._waiting.appendleft if first else self._waiting.append)(request)
            idle, self._busy = not self._busy, True
        if idle:
            self._thread.submit(self._work, loop)
        return await request.future

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """Embeds batches until no request waits, in the engine's thread."""
        while batch := self._take():
            started = time.perf_counter()
            tokens = sum(len(ids) for share in batch for ids in share.tokens)
            try:
                found: Sequence[Vectors | Exception] = self._together(batch, tokens)
            except Exception as error:  # noqa: BLE001 (the waiting requests raise it)
                found = [error] if len(batch) == 1 else [self._alone(share) for share in batch]
            seconds = time.perf_counter() - started
            waited = started - min(share.request.came for share in batch)
            with suppress(RuntimeError):  # the loop is closed, and no request waits any more
                loop.call_soon_threadsafe(self._deliver, batch, found, tokens, waited, seconds)

    def _together(self, batch: list[Share], tokens: int) -> list[Vectors]:
        started = time.monotonic()
        self._running = started, tokens
        try:
            vectors_nd = self._embed([ids for share in batch for ids in share.tokens])
        finally:
            self._running = None
        self.succeeded = time.monotonic()
        if tokens >= MEASURED:
            pace = tokens / max(self.succeeded - started, 1e-6)
            self._pace = pace if not self._pace else 0.8 * self._pace + 0.2 * pace
        return np.split(vectors_nd, np.cumsum([share.stop - share.start for share in batch])[:-1])

    def _alone(self, share: Share) -> Vectors | Exception:
        try:
            return self._together([share], sum(map(len, share.tokens)))[0]
        except Exception as error:  # noqa: BLE001 (the waiting request raises it)
            return error

    def _deliver(
        self,
        batch: list[Share],
        found: Sequence[Vectors | Exception],
        tokens: int,
        waited: float,
        seconds: float,
    ) -> None:
        for share, vectors_nd in zip(batch, found, strict=True):
            request = share.request
            if request.future.done():
                continue
            if isinstance(vectors_nd, Exception):
                request.future.set_exception(vectors_nd)
                continue
            request.found.append(vectors_nd)
            if share.stop == len(request.tokens):
                whole = request.found[0] if len(request.found) == 1 else np.concatenate(request.found)
                request.future.set_result(whole)
        if self._observe is not None:
            self._observe(sum(share.stop - share.start for share in batch), tokens, waited, seconds)

    def _take(self) -> list[Share]:
        """The next batch; where it is empty the thread ends, and the next request starts it again."""
        batch: list[Share] = []
        budget = min(self._batch_tokens, max(FULL_BATCH, int(self._pace * TURN_S)))
        left = budget
        with self._lock:
            while self._waiting:
                request = self._waiting.popleft()
                if request.future.done():  # its client has left, or an earlier share failed
                    continue
                start = request.taken
                stop = _reach(request.tokens, start, share=budget // SHARES, left=left)
                if stop == start and batch:
                    self._waiting.appendleft(request)
                    break
                stop = max(stop, start + 1)
                batch.append(Share(request, start, stop))
                left -= sum(map(len, request.tokens[start:stop]))
                request.taken = stop
                if stop < len(request.tokens):
                    self._waiting.append(request)
            self._busy = bool(batch)
        return batch


def _reach(tokens: Sequence[Tokens], start: int, *, share: int, left: int) -> int:
    """How far a request goes in a batch: to its end where that fits into what is left, else for a share of it.

    A share is one text at least; where not even that fits, the request goes nowhere.
    """
    held, reached = 0, start
    for index in range(start, len(tokens)):
        held += len(tokens[index])
        if held > left:
            return reached
        if index == start or held <= share:
            reached = index + 1
    return len(tokens)
