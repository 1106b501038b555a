"""The Ray Serve application of one model: `serve run f2llm_ray.serve.app:build root=RUN`, or a YAML file.

One deployment holds HTTP and engine: a second hop would cost more than a short text's forward pass. Several models
behind one URL are several such applications and the router of `serve.router`.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from f2llm_ray.serve.api import Info
from f2llm_ray.serve.replica import Replica
from f2llm_ray.serve.routes import answers_http
from f2llm_ray.serve.served_model import Arguments, ServedModel, checked, find_model, options


@answers_http(Info)
class ModelServer(Replica):
    """The replica as Ray Serve deploys it."""


def build(args: dict[str, Any]) -> serve.Application:
    """The application for `serve run` and Serve configs; `args` are `served_model.Arguments`.

    Raises:
        NotServableError: wrong arguments, or no such run or model.
    """
    return application(checked(lambda: find_model(Arguments.model_validate(args))))


def application(served: ServedModel) -> serve.Application:
    """The application of a model that was found."""
    return serve.deployment(ModelServer).options(**options(served.settings)).bind(served)
