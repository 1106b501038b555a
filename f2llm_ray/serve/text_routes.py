"""The requests that carry texts, answered in plain ASGI before FastAPI sees them.

FastAPI's middlewares, router and response classes took some 0.25 of the 0.7 ms that a replica's event loop spent
on a short text. FastAPI keeps the routes that are asked for seldom, and documents these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from f2llm_ray.serve import api, limits
from f2llm_ray.serve.middleware import Rules, header, path_of, refuse
from f2llm_ray.serve.settings import Serving

if TYPE_CHECKING:
    from pydantic import BaseModel
    from starlette.types import ASGIApp, Receive, Scope, Send

EMBEDDINGS, EMBED, SEARCH = "/v1/embeddings", "/embed", "/search"
ROUTES = frozenset({EMBEDDINGS, EMBED, SEARCH})


class Face(Protocol):
    """What stands behind the routes: a model's replica, or the router of a family."""

    settings: Serving
    rules: Rules
    places: limits.Places

    async def answer(self, route: str, body: bytes) -> api.Answer:
        """Answers POST to one of `ROUTES`; ApiError for anything wrong."""

    def models(self) -> list[api.ModelCard]:
        """The models that can be asked for."""

    def info(self) -> BaseModel:
        """Facts and limits."""

    async def check(self) -> None:
        """ApiError 503 when it cannot answer."""


class Asks:
    """ASGI middleware that answers `ROUTES`."""

    def __init__(self, app: ASGIApp, face: Callable[[], Face]) -> None:
        self.app, self.face = app, face

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or hands on what is not for these routes."""
        if scope["type"] != "http" or scope["method"] != "POST" or (route := path_of(scope)) not in ROUTES:
            await self.app(scope, receive, send)
            return
        try:
            face = self.face()
            with face.places.held():
                body = await _body(scope, receive, face.settings)
                if body is None:
                    return
                answer = await face.answer(route, body)
        except api.ApiError as error:
            await refuse(error, send)
        except Exception as error:
            message = f"the request failed here ({type(error).__name__}); the replica's log says more"
            await refuse(api.ApiError(500, "internal_error", message), send)
            raise
        else:
            scope.setdefault("state", {})["answer"] = answer
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(answer.content)).encode()),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": answer.content})


async def _body(scope: Scope, receive: Receive, settings: Serving) -> bytes | None:
    """The body, read no further than the limit; None where the client leaves before its end."""
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
