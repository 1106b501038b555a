"""The Ray Serve application of one model: `serve run f2llm_ray.serve.app:build root=RUN`, or a YAML file.

One deployment holds HTTP and engine: a second hop would cost more than a short text's forward pass. Several models
behind one URL are several such applications and the router of `serve.family`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray import serve

from f2llm_ray.serve.api import Info
from f2llm_ray.serve.catalog import Arguments, find_model
from f2llm_ray.serve.deploy import checked, options
from f2llm_ray.serve.replica import Replica
from f2llm_ray.serve.routes import web

if TYPE_CHECKING:
    from starlette.types import ASGIApp


def _web() -> ASGIApp:
    """Made on the replica: routes pickled with their class lose the types that their annotations name."""
    return web(lambda: serve.get_replica_context().servable_object, Info)


@serve.ingress(_web)
class Endpoint(Replica):
    """The replica as Ray Serve deploys it."""


def build(args: dict[str, Any]) -> serve.Application:
    """The application for `serve run` and Serve configs; `args` are `catalog.Arguments`.

    Raises:
        NotServableError: wrong arguments, or no such run or model.
    """
    served = checked(lambda: find_model(Arguments.model_validate(args)))
    return serve.deployment(Endpoint).options(**options(served.settings)).bind(served)
