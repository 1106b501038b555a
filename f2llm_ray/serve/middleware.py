"""What every HTTP request passes before its route: its key, and after it: the counters and the access log.

Plain ASGI: a middleware of Starlette's own kind costs a task and a queue per request.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson

from f2llm_ray.serve.api import Answer, ApiError
from f2llm_ray.serve.keys import Keys
from f2llm_ray.serve.metrics import Meters
from f2llm_ray.serve.settings import Access

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = frozenset({"/", "/health", "/docs", "/openapi.json"})
"""Paths that need no key: probes and the pages. No vector and no fact of a model is there."""
COUNTED = frozenset({"/v1/embeddings", "/embed", "/search", "/v1/models", "/info", "/health", "/metrics"})
"""Routes with a counter of their own; all else is "other", or a scanner would make a counter per path."""
LOGGED_ID = 128
"""Characters of a client's x-request-id that are logged."""


@dataclass(frozen=True)
class Rules:
    """What the gate of one replica goes by."""

    keys: Keys | None
    meters: Meters
    access_log: bool

    @staticmethod
    def of(access: Access) -> Rules:
        """Reads the keys and makes the counters, on a replica.

        Raises:
            RunError: the keys cannot be read.
        """
        return Rules(None if access.keys is None else Keys(access.keys), Meters(), access.access_log)


class Gate:
    """ASGI middleware: 401 and 429 by key, one count and at most one log line per request."""

    def __init__(self, app: ASGIApp, rules: Callable[[], Rules]) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through or refuses it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        rules = self.rules()
        started = time.perf_counter()
        path = path_of(scope)
        status, key = 499, None  # 499: the client left before an answer began

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if rules.keys is not None and path not in OPEN:
                key = rules.keys.admit(header(scope, b"authorization"))
            await self.app(scope, receive, watched)
        except ApiError as error:
            await refuse(error, watched)
        finally:
            seconds = time.perf_counter() - started
            route = path if path in COUNTED else "other"
            rules.meters.request(route, status, seconds)
            if rules.access_log:
                _log(scope, path=route, status=status, seconds=seconds, key=key)


async def refuse(error: ApiError, send: Send) -> None:
    """Sends an error as the answer."""
    headers = {"Content-Type": "application/json", **error.headers}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = error.body()
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def path_of(scope: Scope) -> str:
    """The route that is asked for, below wherever the application is mounted."""
    path: str = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
    return path or "/"


def header(scope: Scope, name: bytes) -> str | None:
    """The value of a header by its name in lower case."""
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
