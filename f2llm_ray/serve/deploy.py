"""What our Serve applications share: their HTTP routes, how wrong arguments are refused, and their options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from click import ClickException
from pydantic import BaseModel, ValidationError
from ray import serve
from ray.serve.exceptions import RayServeException

from f2llm_ray.base.errors import F2LLMError, RunError
from f2llm_ray.serve.routes import web
from f2llm_ray.serve.settings import Serving

T = TypeVar("T")

SLACK = 256
"""Requests that Serve hands to a replica beyond those that may wait there, so that it is the replica that refuses
them, with our 429, and not Serve with a plain 503."""


class NotServableError(RunError, RayServeException, ClickException):
    """The arguments name nothing that can be served; the message is one sentence.

    Ray Serve shows the message alone of its own exceptions and a stack trace of others (a deployed config), and
    click does the same (`serve run` of an import path).
    """


def answers_http(info: type[BaseModel]) -> Callable[[type[T]], type[T]]:
    """A class decorator: instances of the class, a `RequestHandler`, answer HTTP once Ray Serve deploys it.

    The routes are made on the replica: pickled with the class they would lose the types that annotations name.
    GET /info answers with an `info`.
    """
    return serve.ingress(lambda: web(lambda: serve.get_replica_context().servable_object, info))


def checked(find: Callable[[], T]) -> T:
    """Returns what `find` returns.

    Raises:
        NotServableError: `find` met a wrong argument or a missing model.
    """
    try:
        return find()
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors()]
        raise NotServableError(f"serving arguments: {'; '.join(problems)}") from None
    except F2LLMError as error:
        raise NotServableError(str(error)) from None


def options(settings: Serving) -> dict[str, Any]:
    """Options of a deployment; a Serve config may set others.

    A new version starts beside the old one (max_surge_percent), which stops once the new one is ready. Serve's own
    default stops the old one first: a lone replica would be missing while a model loads, and after a version that
    fails its self-check nothing would be left.
    """
    return {"max_ongoing_requests": settings.max_queued + SLACK, "max_surge_percent": 100}
