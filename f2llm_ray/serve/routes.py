"""The HTTP routes, and their descriptions at /docs.

Requests that carry texts are answered in plain ASGI before FastAPI sees them: its middlewares, router and response
classes took some 0.25 of the 0.7 ms that a replica's event loop spent on a short text. FastAPI answers the routes
that are rarely called, and documents all.
"""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from ray import serve
from starlette.exceptions import HTTPException

from f2llm_ray import __version__
from f2llm_ray.serve import api, limits
from f2llm_ray.serve.dialects import ABSENT, ROUTES, absent
from f2llm_ray.serve.middleware import CrossOrigin, RequestMiddleware, RequestPolicy, header, path_of, send_json
from f2llm_ray.serve.settings import Serving

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout  # a dependency of aiohttp, and so of Ray Serve, on this Python

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

T = TypeVar("T")

BODY_S = 30
"""Seconds in which a body must have come; a slow one holds no place meanwhile."""
PATIENCE_S = 0.1
"""Seconds after which it is looked whether the client is still there: most requests are answered by then."""


class RequestHandler(Protocol):
    """What answers the routes: the replica of a model, or a router of several models."""

    settings: Serving
    policy: RequestPolicy
    slots: limits.RequestSlots

    async def answer(self, route: str, body: bytes) -> api.Answer:
        """Answers POST to one of `dialects.ROUTES`; raises ApiError for a wrong request."""

    def models(self) -> list[api.ModelCard]:
        """The models that a request may name."""

    async def info(self, model: str | None) -> BaseModel:
        """Facts and limits, of the model of this name where one is given; raises ApiError for an unknown one."""

    async def check(self) -> None:
        """Raises ApiError 503 when it cannot answer."""


class TextRoutes:
    """ASGI middleware that answers `ROUTES` and passes other requests on; `RequestMiddleware` sends its errors."""

    def __init__(self, app: ASGIApp, handler: Callable[[], RequestHandler]) -> None:
        self.app, self.handler = app, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request or passes it on."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        route = path_of(scope)
        if route in ABSENT:
            raise absent(route)
        if route not in ROUTES:
            await self.app(scope, receive, send)
            return
        handler = self.handler()
        handler.slots.check()
        body = await _body(scope, receive, handler.settings)
        if body is None:
            return
        with handler.slots.held(len(body)):
            answer = await _while_there(receive, handler.answer(route, body))
        if answer is None:
            return
        scope.setdefault("state", {})["answer"] = answer
        await send_json(send, 200, answer.content, answer.headers)


async def _while_there(receive: Receive, work: Awaitable[T]) -> T | None:
    """The result of the work; it is cancelled, with None as its result, where the client leaves."""
    answering, left = asyncio.current_task(), False
    assert answering is not None  # noqa: S101 (for the type: this runs in a task)
    watch: asyncio.Task[None] | None = None

    async def notice() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        answering.cancel()

    def start() -> None:
        nonlocal watch
        watch = asyncio.ensure_future(notice())

    # A timer costs a microsecond, a task that waits beside every request twenty.
    timer = asyncio.get_running_loop().call_later(PATIENCE_S, start)
    try:
        return await work
    except asyncio.CancelledError:
        if left:
            return None
        raise
    finally:
        timer.cancel()
        if watch is not None:
            watch.cancel()


async def _body(scope: Scope, receive: Receive, settings: Serving) -> bytes | None:
    """Reads a body, no further than the limit; None where the client leaves before its end.

    Raises:
        ApiError: 413 for a larger one, 408 where it does not come in `BODY_S` seconds, 415 for an encoding other
            than gzip.
    """
    announced = header(scope, b"content-length") or ""
    limits.check_body(int(announced) if announced.isdecimal() else 0, settings)
    body = b""
    try:
        async with timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                limits.check_body(len(body), settings)
                if not message.get("more_body", False):
                    break
    except asyncio.TimeoutError:
        raise api.ApiError(408, "slow_body", f"the body did not come within {BODY_S} s") from None
    encoding = (header(scope, b"content-encoding") or "identity").lower()
    return body if encoding == "identity" else _decoded(body, encoding, settings)


def _decoded(body: bytes, encoding: str, settings: Serving) -> bytes:
    """The content of a packed body; no more of it is unpacked than may be."""
    if encoding != "gzip":
        message = f"content-encoding: {encoding[: api.NAME_CHARS]!r} is not taken; send gzip, or the body as it is"
        raise api.ApiError(415, "unsupported_encoding", message)
    unpack = zlib.decompressobj(wbits=31)
    try:
        content = unpack.decompress(body, settings.max_body_bytes + 1)
    except zlib.error as error:
        raise api.ApiError(400, "invalid_encoding", f"the body is not gzip: {error}") from None
    limits.check_body(len(content), settings)
    if not unpack.eof:
        raise api.ApiError(400, "invalid_encoding", "the body is not whole: its gzip stream ends early")
    if unpack.unused_data:
        # A stream after it may follow, but each costs a copy of the rest, and a body may hold half a million.
        message = f"{len(unpack.unused_data):,} bytes follow the end of the gzip stream; pack the body as one"
        raise api.ApiError(400, "invalid_encoding", message)
    return content


def web(handler: Callable[[], RequestHandler], info: Any) -> ASGIApp:
    """Makes the ASGI application of all routes; `RequestHandler.info` returns an `info`.

    `handler` is called per request, so that what it returns may be made after the routes.
    """
    app = FastAPI(
        title="f2llm_ray", version=__version__, redirect_slashes=False, description=DESCRIPTION, redoc_url=None
    )
    app.add_exception_handler(api.ApiError, _failed)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _failed)

    async def documented() -> None:
        raise AssertionError("TextRoutes answers these routes")

    for path, route in ROUTES.items():
        app.post(path, summary=route.summary, **_docs(route.answer, route.ask))(documented)

    app.get("/", response_class=HTMLResponse)(page)

    @app.get("/v1/models", **_docs(api.ModelList))
    async def models() -> Response:
        """The models that can be asked for, with their dims, lengths and measured scores."""
        return _json(api.ModelList(data=handler().models()).model_dump_json().encode())

    @app.get("/v1/models/{name:path}", **_docs(api.ModelCard))
    async def model(name: str) -> Response:
        """One of them, by its name or another that it goes by."""
        cards = handler().models()
        limits.check_model(name, [known for card in cards for known in (card.id, *card.aliases)])
        found = next(card for card in cards if name in (card.id, *card.aliases))
        return _json(found.model_dump_json().encode())

    @app.get("/info", **_docs(info))
    async def facts(model: str | None = None) -> Response:
        """Facts of the model or models, and the limits of requests; of the one that `model` names, if given."""
        return _json((await handler().info(model)).model_dump_json().encode())

    @app.get("/health", **_docs(api.Health))
    async def health() -> Response:
        """Encodes a short text; a router checks that its models run."""
        await handler().check()
        return _json(b'{"status":"ok"}')

    answered = RequestMiddleware(TextRoutes(app, handler), policy=lambda: handler().policy)
    return CrossOrigin(answered, policy=lambda: handler().policy)


def answers_http(info: Any) -> Callable[[type[T]], type[T]]:
    """A class decorator: instances of the class, a `RequestHandler`, answer HTTP once Ray Serve deploys it.

    The routes are made on the replica: pickled with the class they would lose the types that annotations name.
    GET /info answers with an `info`.
    """
    return serve.ingress(lambda: web(lambda: serve.get_replica_context().servable_object, info))


PAGE = Path(__file__).with_name("demo.html").read_text(encoding="utf-8")
ONLY_ITSELF = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
"""The page may load nothing but answers of this endpoint. It never shows texts of a corpus as markup."""


async def page() -> Response:
    """A page to search the models' corpora with."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": ONLY_ITSELF})


DESCRIPTION = """Text embeddings. Every answer other than 200 has the body `{"error": {"message", "type", "param",
"code"}}`. Where keys are required, send `Authorization: Bearer <key>`."""


def _json(content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(content, status, headers, "application/json")


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 (the handler is registered for it; this is for the type)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    known = api.ApiError(error.status_code, code, f"{request.method} {request.url.path}: {error.detail}")
    return _json(known.body(), known.status, dict(error.headers or {}))


async def _failed(_: Request, error: Exception) -> Response:
    known = error if isinstance(error, api.ApiError) else api.internal_error(error)
    return _json(known.body(), known.status, known.headers)


def _docs(answer: Any, ask: type[BaseModel] | None = None) -> dict[str, Any]:
    """Arguments of a FastAPI route that describe bodies which the route itself reads and writes."""
    statuses = (400, 401, 404, 408, 413, 415, 422, 429, 503) if ask else (401, 429, 503)
    docs: dict[str, Any] = {
        "responses": {200: {"model": answer}, **{s: {"model": api.ErrorBody} for s in statuses}}
    }
    if ask is not None:
        content = {"application/json": {"schema": ask.model_json_schema()}}
        docs["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return docs
