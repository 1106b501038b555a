"""What surrounds every HTTP request: the check of its key before, errors, metrics and the access log after.

Plain ASGI, since Starlette's own kind of middleware costs a task and a queue per request.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import orjson
from ray.serve import metrics
from starlette.middleware.cors import CORSMiddleware

from f2llm_ray.serve.api import Answer, ApiError, internal_error
from f2llm_ray.serve.dialects import ROUTES
from f2llm_ray.serve.keys import Keys
from f2llm_ray.serve.settings import Access

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = frozenset({"/", "/health", "/docs", "/openapi.json"})
"""Paths that need no key: probes and pages. They show neither vectors nor facts of a model."""
MODELS = "/v1/models"
COUNTED = frozenset({*ROUTES, MODELS, "/info", "/health"})
"""Routes with a counter of their own; all others count as "other", or a scanner would make a counter per path."""
SHOWN = ("retry-after", "x-request-id", "x-truncated-inputs", "x-chunked-inputs")
"""Headers of answers that a page in a browser may read, beside those that it always may."""
LOGGED_ID = 128
"""Characters of a client's x-request-id that are logged."""

SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]
TEXTS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0]


class RequestMetrics:
    """What one replica counts; Ray adds application, deployment and replica to each as labels.

    Dashboards rely on the names; docs/serving.md lists them.
    """

    def __init__(self) -> None:
        self._requests = metrics.Counter("f2llm_requests", "Requests answered", ("route", "code"))
        self._seconds = metrics.Histogram("f2llm_request_seconds", "From request to answer", SECONDS, ("route",))
        self._tokens = metrics.Counter("f2llm_tokens", "Tokens embedded, prompts and EOS included")
        self._batch = metrics.Histogram("f2llm_batch_texts", "Texts in one batch of the engine", TEXTS)
        self._queue = metrics.Histogram("f2llm_queue_seconds", "Wait of a batch's oldest request", SECONDS)
        self._forward = metrics.Histogram("f2llm_forward_seconds", "One batch through the engine", SECONDS)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        self._requests.inc(tags={"route": route, "code": str(status)})
        self._seconds.observe(seconds, tags={"route": route})

    def batch(self, texts: int, tokens: int, waited: float, seconds: float) -> None:
        """Counts a batch that the engine has embedded."""
        self._tokens.inc(tokens, tags={})
        self._batch.observe(texts, tags={})
        self._queue.observe(waited, tags={})
        self._forward.observe(seconds, tags={})


class RequestPolicy:
    """The keys that one replica accepts, its metrics, and whether it has an access log.

    Raises:
        RunError: the keys cannot be read.
    """

    def __init__(self, access: Access) -> None:
        self.keys = None if access.keys is None else Keys(access.keys)
        self.metrics, self.access_log = RequestMetrics(), access.access_log
        self.cors_origins = access.cors_origins


class RequestMiddleware:
    """ASGI middleware: checks keys, sends errors, counts each request and logs it where that is wanted."""

    def __init__(self, app: ASGIApp, policy: Callable[[], RequestPolicy]) -> None:
        self.app, self.policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        policy = self.policy()
        started = time.perf_counter()
        head = scope["method"] == "HEAD"
        if head:  # answered as GET is, without the body
            scope = {**scope, "method": "GET"}
        path = path_of(scope)
        status, key = 499, None  # 499: the client left before an answer began

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send({**message, "body": b""} if head and message["type"] == "http.response.body" else message)

        try:
            if policy.keys is not None and path not in OPEN:
                key = policy.keys.admit(header(scope, b"authorization"))
            await self.app(scope, receive, watched)
        except ApiError as error:
            await send_json(watched, error.status, error.body(), error.headers)
        except Exception as error:
            if status == 499:
                await send_json(watched, 500, internal_error(error).body())
            raise
        finally:
            seconds = time.perf_counter() - started
            route = MODELS if path.startswith(f"{MODELS}/") else path if path in COUNTED else "other"
            policy.metrics.request(route, status, seconds)
            if policy.access_log:
                _log(scope, path=route, status=status, seconds=seconds, key=key)


class CrossOrigin:
    """ASGI middleware that lets pages of the policy's origins send requests from a browser."""

    def __init__(self, app: ASGIApp, policy: Callable[[], RequestPolicy]) -> None:
        self.app, self.policy = app, policy
        self._allowing: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers a browser that asks whether it may send one."""
        app = self.app
        # The policy is there with the first request, not yet when the routes are made.
        if scope["type"] == "http" and (origins := self.policy().cors_origins):
            if self._allowing is None:
                self._allowing = CORSMiddleware(
                    app,
                    allow_origins=origins,
                    allow_methods=["GET", "POST"],
                    allow_headers=["*"],
                    expose_headers=SHOWN,
                    max_age=600,
                )
            app = self._allowing
        await app(scope, receive, send)


async def send_json(send: Send, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
    """Sends a JSON body as the answer to a request."""
    named = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    raw = [(name.lower().encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def path_of(scope: Scope) -> str:
    """Path of a request, without the prefix that the application is mounted at."""
    path: str = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
    return path or "/"


def header(scope: Scope, name: bytes) -> str | None:
    """Value of a header, by its name in lower case; None without it."""
    return next((value.decode("latin-1") for found, value in scope["headers"] if found == name), None)


def _log(scope: Scope, *, path: str, status: int, seconds: float, key: str | None) -> None:
    request_id = header(scope, b"x-request-id")
    line = {
        "time": round(time.time(), 3),
        "id": request_id and request_id[:LOGGED_ID],
        "key": key,
        "method": scope["method"],
        "route": path,
        "status": status,
        "ms": round(seconds * 1000, 1),
    }
    answer = scope.get("state", {}).get("answer")
    if isinstance(answer, Answer):
        line |= {"model": answer.model, "inputs": answer.inputs, "tokens": answer.tokens}
    # Not through sys.stdout: on a replica Serve copies what goes there into its own log, and again to stderr.
    os.write(1, orjson.dumps(line) + b"\n")
