"""Several models behind one URL: `model` of a request picks one, each an application that scales by itself.

The models are applications of `serve.app` beside the router, as in serve_configs/family.yaml. The router holds no
model and imports no torch. It reads the facts of each model from its folder, so that GET /v1/models lists a model
that is scaled to zero too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, model_validator
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from f2llm_ray import __version__
from f2llm_ray.base.errors import RunError
from f2llm_ray.serve import api, limits
from f2llm_ray.serve.dialects import ROUTES
from f2llm_ray.serve.middleware import RequestPolicy
from f2llm_ray.serve.routes import answers_http
from f2llm_ray.serve.served_model import Arguments, checked, find_model, options, with_limits
from f2llm_ray.serve.settings import Access, Limits, Serving

RETRIES = 2
"""Times that a request is sent again when its replica dies; embedding a text twice does no harm."""
FRESH_S = 1.0
"""Seconds for which Serve's word on its applications is taken as it was."""


class RouterArguments(Access, Limits):
    """The arguments of the router's application."""

    models: dict[str, Arguments] = Field(min_length=1)
    """The arguments of each model's application, by the application's name."""
    default: str | None = None
    """Application that answers requests that name no model; the first one when unset."""
    start_wait_s: float = Field(default=60, gt=0)
    """Longest wait for a model that has no replica yet; beyond it the answer is 503 with Retry-After."""

    @model_validator(mode="after")
    def _known(self) -> RouterArguments:
        if self.default is not None and self.default not in self.models:
            raise ValueError(f"default: {self.default!r} is not one of models: {', '.join(self.models)}")
        return self


class RouterInfo(api.Body):
    """Answer of GET /info; GET /info?model=NAME has one model's own `api.Info`."""

    models: list[api.ModelCard]
    default: str
    """Model that answers requests that name none."""
    limits: Serving
    version: str


@dataclass(frozen=True)
class RoutedModels:
    """The models behind a router, and the router's own settings."""

    apps: Mapping[str, api.ModelCard]
    """Each model's card, by the name of its application."""
    names: Mapping[str, str]
    """Application by every name that clients may use."""
    default: str
    settings: Serving
    arguments: RouterArguments


class ModelRouter:
    """Sends each request to its model's application and waits, for a bounded time, for one that is starting."""

    def __init__(self, routed: RoutedModels) -> None:
        self.routed, self.settings = routed, routed.settings
        self.policy, self.slots = RequestPolicy(routed.arguments), limits.RequestSlots(routed.settings)
        self._handles: dict[str, DeploymentHandle] = {}
        self._asked: tuple[asyncio.Future[list[str]], float] | None = None

    async def answer(self, route: str, body: bytes) -> api.Answer:
        """Returns the answer of the model that the body names.

        Raises:
            ApiError: 404 for an unknown model, 503 for one that does not start in time, and the model's refusals.
        """
        app = self._pick(route, body)
        answer = await self._ask(app, lambda handle: handle.forward.remote(route, body))
        if isinstance(answer, api.ApiError):
            raise answer
        sent: api.Answer = answer
        return sent

    def models(self) -> list[api.ModelCard]:
        """The cards of all models, running or not."""
        return list(self.routed.apps.values())

    async def info(self, model: str | None) -> BaseModel:
        """Facts and limits, as a `RouterInfo`; what the application of one model says of itself where it is named.

        Raises:
            ApiError: 404 for an unknown model, 503 for one that does not start in time.
        """
        if model is not None:
            limits.check_model(model, tuple(self.routed.names))
            facts: BaseModel = await self._ask(self.routed.names[model], lambda handle: handle.info.remote(None))
            return facts
        default = self.routed.apps[self.routed.default].id
        return RouterInfo(models=self.models(), default=default, limits=self.settings, version=__version__)

    async def check(self) -> None:
        """Checks with Ray Serve that all applications run, once for all who ask within `FRESH_S` seconds.

        One that is scaled to zero counts as running.

        Raises:
            ApiError: 503 when one does not run.
        """
        if self._asked is None or (self._asked[0].done() and time.monotonic() - self._asked[1] > FRESH_S):
            self._asked = asyncio.ensure_future(asyncio.to_thread(self._down)), time.monotonic()
        down = await asyncio.shield(self._asked[0])
        if down:
            raise api.ApiError(503, "not_ready", f"not running: {', '.join(down)}", None, 5)

    def _down(self) -> list[str]:
        """The applications that do not run."""
        found = serve.status().applications
        return [app for app in self.routed.apps if app not in found or found[app].status != "RUNNING"]

    def _pick(self, route: str, body: bytes) -> str:
        content = api.read_json(body)
        name = content.get("model") if isinstance(content, dict) else None
        if name is None and not ROUTES[route].names_model:
            return self.routed.default
        if not isinstance(name, str):
            # There is no model to pick; the checks of a request raise the error that says why.
            api.read_request(ROUTES[route].ask, body)
        limits.check_model(str(name), tuple(self.routed.names))
        return self.routed.names[str(name)]

    async def _ask(self, app: str, call: Callable[[DeploymentHandle], Awaitable[Any]]) -> Any:
        """What an application answers to a call, which is sent again when its replica dies."""
        for attempt in range(RETRIES + 1):
            pending = asyncio.ensure_future(call(self._handle(app)))
            try:
                done, _ = await asyncio.wait({pending}, timeout=self.routed.arguments.start_wait_s)
                if not done and not await _running(app):
                    raise self._starting(app)
                return await pending
            except RayActorError:
                if attempt == RETRIES:
                    raise
            finally:
                pending.cancel()
        raise AssertionError  # the last attempt returns or raises

    def _handle(self, app: str) -> DeploymentHandle:
        if app not in self._handles:
            try:
                self._handles[app] = serve.get_app_handle(app)
            except RayServeException:
                raise self._starting(app) from None
        return self._handles[app]

    def _starting(self, app: str) -> api.ApiError:
        wait = max(1, round(self.routed.arguments.start_wait_s / 2))
        message = f"model {self.routed.apps[app].id!r} is starting; try again in {wait} s"
        return api.ApiError(503, "starting", message, "model", wait)


async def _running(app: str) -> bool:
    """Whether an application has a replica that runs. Serve is asked only after a long wait."""
    found = (await asyncio.to_thread(serve.status)).applications.get(app)
    deployments = () if found is None else found.deployments.values()
    return any(deployment.replica_states.get("RUNNING") for deployment in deployments)


@answers_http(RouterInfo | api.Info)
class Router(ModelRouter):
    """The router as Ray Serve deploys it."""


def build(args: dict[str, Any]) -> serve.Application:
    """The router's application; `args` are `RouterArguments`.

    Raises:
        NotServableError: wrong arguments, no such run or model, or two models of one name.
    """
    routed = checked(lambda: find_models(RouterArguments.model_validate(args)))
    return serve.deployment(Router).options(**options(routed.settings)).bind(routed)


def find_models(args: RouterArguments) -> RoutedModels:
    """Reads the models' folders for what the router needs.

    Raises:
        RunError: no such run or model, or two models of one name.
    """
    apps: dict[str, api.ModelCard] = {}
    names: dict[str, str] = {}
    for app, given in args.models.items():
        served = find_model(given)
        apps[app] = served.card
        for name in served.names:
            if name in names:
                raise RunError(f"models {names[name]!r} and {app!r} are both asked for by the name {name!r}")
            names[name] = app
    return RoutedModels(
        apps=apps,
        names=names,
        default=args.default or next(iter(args.models)),
        settings=with_limits(Serving(), args),
        arguments=args,
    )
