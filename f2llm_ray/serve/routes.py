"""The HTTP routes, and their descriptions at /docs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from f2llm_ray import __version__
from f2llm_ray.serve import api
from f2llm_ray.serve.middleware import RequestMiddleware
from f2llm_ray.serve.search import SearchAnswer, SearchRequest
from f2llm_ray.serve.text_routes import EMBED, EMBEDDINGS, SEARCH, RequestHandler, TextRoutes

if TYPE_CHECKING:
    from starlette.types import ASGIApp


def web(handler: Callable[[], RequestHandler], info: type[BaseModel]) -> ASGIApp:
    """Makes the ASGI application of all routes.

    Args:
        handler: returns what answers the requests; called per request, so that it may be made after the routes.
        info: what `RequestHandler.info` returns.
    """
    app = FastAPI(
        title="f2llm_ray", version=__version__, redirect_slashes=False, description=DESCRIPTION, redoc_url=None
    )
    app.add_exception_handler(api.ApiError, _failed)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _failed)

    async def documented() -> None:
        raise AssertionError("TextRoutes answers these routes")

    vectors: Any = list[list[float]] | dict[str, Any]
    for route, answer, request, summary in (
        (EMBEDDINGS, api.EmbeddingsAnswer, api.EmbeddingsRequest, "Vectors in OpenAI's shape"),
        (EMBED, vectors, api.EmbedRequest, "A list of vectors, or such lists by type where types are named"),
        (SEARCH, SearchAnswer, SearchRequest, "The nearest passages of the model's corpus at each of its dims"),
    ):
        app.post(route, summary=summary, **_docs(answer, request))(documented)

    app.get("/", response_class=HTMLResponse)(page)

    @app.get("/v1/models", **_docs(api.ModelList))
    async def models() -> Response:
        """The models that can be asked for, with their dims, lengths and measured scores."""
        return _json(api.ModelList(data=handler().models()).model_dump_json().encode())

    @app.get("/info", **_docs(info))
    async def facts() -> Response:
        """Facts of the model or models, and the limits of requests."""
        return _json(handler().info().model_dump_json().encode())

    @app.get("/health", **_docs(api.Health))
    async def health() -> Response:
        """Encodes a short text; a router checks that its models run."""
        await handler().check()
        return _json(b'{"status":"ok"}')

    return RequestMiddleware(TextRoutes(app, handler), policy=lambda: handler().policy)


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
    statuses = (400, 401, 404, 413, 422, 429, 503) if ask else (401, 429, 503)
    docs: dict[str, Any] = {
        "responses": {200: {"model": answer}, **{s: {"model": api.ErrorBody} for s in statuses}}
    }
    if ask is not None:
        content = {"application/json": {"schema": ask.model_json_schema()}}
        docs["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return docs
