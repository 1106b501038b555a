"""What our Serve applications have in common: how they are built, refused and rolled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from click import ClickException
from pydantic import ValidationError
from ray.serve.exceptions import RayServeException

from f2llm_ray.base.errors import F2LLMError, RunError
from f2llm_ray.serve.settings import Serving

T = TypeVar("T")

SLACK = 256
"""Requests that Serve hands to a replica beyond those that may wait there, so that it is the replica that refuses
them, with our 429, and not Serve with a plain 503."""


class NotServableError(RunError, RayServeException, ClickException):
    """Nothing to serve there, in one sentence.

    Ray Serve shows the message alone of its own exceptions and a stack trace of others (a deployed config), and
    click does the same (`serve run` of an import path).
    """


def checked(find: Callable[[], T]) -> T:
    """What `find` finds; NotServableError in place of a wrong argument or a missing model."""
    try:
        return find()
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors()]
        raise NotServableError(f"serving arguments: {'; '.join(problems)}") from None
    except F2LLMError as error:
        raise NotServableError(str(error)) from None


def options(settings: Serving) -> dict[str, Any]:
    """Options of a deployment; a Serve config may set others.

    A new version starts beside the old one (max_surge_percent), and the old one goes when the new one is ready:
    Serve's own default stops first, so that a lone replica would be away for as long as a model takes to load, and
    a version that fails its self-check would leave nothing.
    """
    return {"max_ongoing_requests": settings.max_queued + SLACK, "max_surge_percent": 100}
