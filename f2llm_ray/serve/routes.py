"""All HTTP routes over whatever answers them, and what /docs says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from f2llm_ray import __version__
from f2llm_ray.serve import api, metrics
from f2llm_ray.serve.middleware import Gate
from f2llm_ray.serve.search import SearchAnswer, SearchRequest
from f2llm_ray.serve.text_routes import EMBED, EMBEDDINGS, SEARCH, Asks, Face

if TYPE_CHECKING:
    from starlette.types import ASGIApp


def web(face: Callable[[], Face], info: type[BaseModel]) -> ASGIApp:
    """The routes.

    Args:
        face: gives what answers them, which may be made after the routes.
        info: what `Face.info` returns.
    """
    app = FastAPI(
        title="f2llm_ray", version=__version__, redirect_slashes=False, description=DESCRIPTION, redoc_url=None
    )
    app.add_exception_handler(api.ApiError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _failed)

    async def documented() -> None:
        raise AssertionError("Asks answers this before it comes here")

    def document(route: str, answer: Any, ask: type[BaseModel], summary: str) -> None:
        app.post(route, summary=summary, **_docs(answer, ask))(documented)

    vectors = list[list[float]] | dict[str, Any]
    document(EMBEDDINGS, api.EmbeddingsAnswer, api.EmbeddingsRequest, "Vectors in OpenAI's shape")
    document(EMBED, vectors, api.EmbedRequest, "A list of vectors, or such lists by type where types are named")
    document(SEARCH, SearchAnswer, SearchRequest, "The nearest passages of the model's corpus at each of its dims")

    app.get("/", response_class=HTMLResponse)(page)

    @app.get("/v1/models", **_docs(api.ModelList))
    async def models() -> Response:
        """The models that can be asked for, with their dims, lengths and measured scores."""
        return _json(api.ModelList(data=face().models()).model_dump_json().encode())

    @app.get("/info", **_docs(info))
    async def facts() -> Response:
        """Facts of what is served, and the limits of requests."""
        return _json(face().info().model_dump_json().encode())

    @app.get("/health", **_docs(api.Health))
    async def health() -> Response:
        """Encodes a short text; a router asks after its models."""
        await face().check()
        return _json(b'{"status":"ok"}')

    @app.get("/metrics", responses={503: {"model": api.ErrorBody}}, response_class=PrometheusText)
    async def counters() -> Response:
        """Counters of all replicas on this node, in Prometheus text; Ray's exporter of each node has them too."""
        text = await metrics.exported()
        if text is None:
            raise api.ApiError(503, "no_metrics", "Ray's metrics exporter on this node does not answer", None, 10)
        return PrometheusText(text)

    return Gate(Asks(app, face), rules=lambda: face().rules)


PAGE = Path(__file__).with_name("demo.html").read_text(encoding="utf-8")
ONLY_ITSELF = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
"""What the page may load: nothing but answers of this endpoint. Texts of a corpus are never markup there."""


async def page() -> Response:
    """A page to search the models' corpora with."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": ONLY_ITSELF})


DESCRIPTION = """Text embeddings. Every answer other than 200 has the body `{"error": {"message", "type", "param",
"code"}}`. Where keys are required, send `Authorization: Bearer <key>`."""


class PrometheusText(Response):
    """Prometheus' text format."""

    media_type = "text/plain; version=0.0.4"


def _json(content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(content, status, headers, "application/json")


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, api.ApiError)  # noqa: S101 (the handler is registered for it; this is for the type)
    return _json(error.body(), error.status, error.headers)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 (as above)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    answer = api.ApiError(error.status_code, code, f"{request.method} {request.url.path}: {error.detail}")
    return _json(answer.body(), answer.status, dict(error.headers or {}))


async def _failed(_: Request, error: Exception) -> Response:
    message = f"the request failed here ({type(error).__name__}); the replica's log says more"
    return _json(api.ApiError(500, "internal_error", message).body(), 500)


def _docs(answer: Any, ask: type[BaseModel] | None = None) -> dict[str, Any]:
    """What /docs shows of a route that reads and writes its bodies itself."""
    statuses = (400, 401, 404, 413, 422, 429, 503) if ask else (401, 429, 503)
    docs: dict[str, Any] = {
        "responses": {200: {"model": answer}, **{s: {"model": api.ErrorBody} for s in statuses}}
    }
    if ask is not None:
        content = {"application/json": {"schema": ask.model_json_schema()}}
        docs["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return docs
