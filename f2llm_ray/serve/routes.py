"""The HTTP routes over a replica."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from f2llm_ray import __version__
from f2llm_ray.serve import api, limits
from f2llm_ray.serve.replica import Replica
from f2llm_ray.serve.settings import Serving


def web(replica: Callable[[], Replica]) -> FastAPI:
    """The routes.

    Args:
        replica: gives the replica, which may be made after its routes.
    """
    app = FastAPI(title="f2llm_ray", version=__version__, redirect_slashes=False)
    app.add_exception_handler(api.ApiError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _failed)

    @app.post("/v1/embeddings", **_docs(api.EmbeddingsAnswer, api.EmbeddingsRequest))
    async def embeddings(request: Request) -> Response:
        """Embeds texts or token lists (OpenAI's shape)."""
        here = replica()
        with here.admitted():
            ask = api.read_request(api.EmbeddingsRequest, await _body(request, here.settings))
            limits.check_model(ask.model, here.info)
            vectors, tokens = await here.embed(ask, ask.input, "input")
            name = here.info.name
            return _json(api.embeddings_answer(vectors, model=name, tokens=tokens, encoding=ask.encoding_format))

    @app.post("/embed", **_docs(list[list[float]], api.EmbedRequest))
    async def embed(request: Request) -> Response:
        """Embeds texts; answers a plain list of lists."""
        here = replica()
        with here.admitted():
            ask = api.read_request(api.EmbedRequest, await _body(request, here.settings))
            vectors, _ = await here.embed(ask, ask.inputs, "inputs")
            return _json(api.embed_answer(vectors))

    @app.get("/v1/models")
    async def models() -> api.ModelList:
        """The model served here."""
        here = replica()
        return api.ModelList(data=[api.ModelCard(id=here.info.name, created=here.created)])

    @app.get("/info")
    async def info() -> api.Info:
        """The model's facts and the limits of requests."""
        here = replica()
        return api.Info(
            model=here.info.name,
            dims=here.info.dims,
            prompts=here.info.prompts,
            instructions=here.info.instructions,
            max_tokens=limits.longest_text(here.info, here.settings),
            limits=here.settings,
            device=here.engine.device,
            version=__version__,
        )

    @app.get("/health", **_docs(api.Health))
    async def health() -> Response:
        """Encodes a short text."""
        await replica().check()
        return _json(b'{"status":"ok"}')

    return app


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


async def _body(request: Request, settings: Serving) -> bytes:
    """The body, read no further than the limit."""
    announced = request.headers.get("content-length", "")
    limits.check_body(int(announced) if announced.isdecimal() else 0, settings)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        limits.check_body(len(body), settings)
    return bytes(body)


def _docs(answer: Any, ask: type[BaseModel] | None = None) -> dict[str, Any]:
    """What /docs shows of a route that reads and writes its bodies itself."""
    statuses = (400, 404, 413, 422, 429, 503) if ask else (503,)
    docs: dict[str, Any] = {
        "responses": {200: {"model": answer}, **{s: {"model": api.ErrorBody} for s in statuses}}
    }
    if ask is not None:
        content = {"application/json": {"schema": ask.model_json_schema()}}
        docs["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return docs
