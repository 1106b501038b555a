"""The requests that carry texts, answered in plain ASGI before FastAPI sees them.

FastAPI's middlewares, router and response classes took some 0.25 of the 0.7 ms that a replica's event loop spent
on a short text. FastAPI answers the routes that are rarely called, and documents these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from f2llm_ray.serve import api, limits
from f2llm_ray.serve.middleware import RequestPolicy, header, path_of, send_json
from f2llm_ray.serve.settings import Serving

if TYPE_CHECKING:
    from pydantic import BaseModel
    from starlette.types import ASGIApp, Receive, Scope, Send

EMBEDDINGS, EMBED, SEARCH = "/v1/embeddings", "/embed", "/search"
ROUTES = frozenset({EMBEDDINGS, EMBED, SEARCH})


class RequestHandler(Protocol):
    """What answers the routes: the replica of a model, or a router of several models."""

    settings: Serving
    policy: RequestPolicy
    slots: limits.RequestSlots

    async def answer(self, route: str, body: bytes) -> api.Answer:
        """Answers POST to one of `ROUTES`; raises ApiError for a wrong request."""

    def models(self) -> list[api.ModelCard]:
        """The models that a request may name."""

    def info(self) -> BaseModel:
        """Facts and limits."""

    async def check(self) -> None:
        """Raises ApiError 503 when it cannot answer."""


class TextRoutes:
    """ASGI middleware that answers `ROUTES` and passes other requests on; `RequestMiddleware` sends its errors."""

    def __init__(self, app: ASGIApp, handler: Callable[[], RequestHandler]) -> None:
        self.app, self.handler = app, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request or passes it on."""
        if scope["type"] != "http" or scope["method"] != "POST" or (route := path_of(scope)) not in ROUTES:
            await self.app(scope, receive, send)
            return
        handler = self.handler()
        with handler.slots.held():
            body = await _body(scope, receive, handler.settings)
            if body is None:
                return
            answer = await handler.answer(route, body)
        scope.setdefault("state", {})["answer"] = answer
        await send_json(send, 200, answer.content)


async def _body(scope: Scope, receive: Receive, settings: Serving) -> bytes | None:
    """Reads a body, no further than the limit; None where the client leaves before its end."""
    announced = header(scope, b"content-length") or ""
    limits.check_body(int(announced) if announced.isdecimal() else 0, settings)
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        limits.check_body(len(body), settings)
        if not message.get("more_body", False):
            return body
