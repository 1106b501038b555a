"""The Ray Serve application: `serve run f2llm_ray.serve.app:build root=RUN`, or the same from a YAML file.

One deployment holds HTTP and engine: a second hop would cost more than a short text's forward pass.
"""

from __future__ import annotations

from typing import Any

from click import ClickException
from fastapi import FastAPI
from pydantic import BaseModel, Field, ValidationError, model_validator
from ray import serve
from ray.serve.exceptions import RayServeException

from f2llm_ray.errors import F2LLMError, RunError
from f2llm_ray.model.checkpoint import INFO_FILE
from f2llm_ray.run import Folder
from f2llm_ray.section import Section
from f2llm_ray.serve.replica import Replica
from f2llm_ray.serve.routes import web
from f2llm_ray.serve.settings import Serving

SLACK = 256
"""Requests that Serve hands to a replica beyond those that may wait there, so that it is the replica that refuses
them, with our 429, and not Serve with a plain 503."""


def _web() -> FastAPI:
    """Made on the replica: routes pickled with their class lose the types that their annotations name."""
    return web(lambda: serve.get_replica_context().servable_object)


@serve.ingress(_web)
class Endpoint(Replica):
    """The replica as Ray Serve deploys it."""


class Arguments(Section):
    """What `build` takes: a run or a model folder, and limits that differ from the run's."""

    root: str | None = None
    """Root of a finished run; its report says which model is served, and with what limits."""
    model: str | None = None
    """A model folder."""
    max_inputs: int | None = None
    max_tokens: int | None = None
    max_body_bytes: int | None = None
    max_queued: int | None = None
    batch_tokens: int | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Arguments:
        if (self.root is None) == (self.model is None):
            raise ValueError("set exactly one of root and model")
        return self


class ReportModel(BaseModel):
    """A model of a run, as its report names it."""

    name: str
    folder: str


class Report(BaseModel):
    """What serving reads of a run's report."""

    models: list[ReportModel] = Field(min_length=1)
    serving: Serving = Serving()


class NotServableError(RunError, RayServeException, ClickException):
    """Nothing to serve there, in one sentence.

    Ray Serve shows the message alone of its own exceptions and a stack trace of others (a deployed config), and
    click does the same (`serve run` of an import path).
    """


def build(args: dict[str, Any]) -> serve.Application:
    """The application for `serve run` and Serve configs; `args` are `Arguments`.

    Raises:
        NotServableError: wrong arguments, or no such run or model.
    """
    try:
        model, settings = find_model(Arguments.model_validate(args))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors()]
        raise NotServableError(f"serving arguments: {'; '.join(problems)}") from None
    except F2LLMError as error:
        raise NotServableError(str(error)) from None
    deployment = serve.deployment(Endpoint).options(max_ongoing_requests=settings.max_queued + SLACK)
    return deployment.bind(model, settings)


def find_model(args: Arguments) -> tuple[str, Serving]:
    """URI of the model folder to serve, and the limits it is served with.

    Raises:
        RunError: no finished run, or no model folder, where the arguments say.
        ValidationError: a limit out of its range.
    """
    settings = Serving()
    folder = Folder.at(args.model or args.root or "")
    if args.root is not None:
        report = _report(folder)
        settings = report.serving
        entries = {entry.name: entry for entry in report.models}
        wanted = settings.model or report.models[-1].name
        if wanted not in entries:
            raise RunError(f"{folder.uri}/report.json: model {wanted!r} is not one of {', '.join(entries)}")
        folder = folder / entries[wanted].folder
    if not folder.exists(INFO_FILE):
        raise RunError(f"{folder.uri}: not a model folder: it has no {INFO_FILE}")
    overrides = args.model_dump(exclude={"root", "model"}, exclude_none=True)
    return folder.uri, Serving.model_validate({**settings.model_dump(), **overrides})


def _report(root: Folder) -> Report:
    if not root.exists("report.json"):
        raise RunError(f"{root.uri}: no finished run: it has no report.json; run jobs/pipeline.py first")
    try:
        return Report.model_validate(root.read_json("report.json"))
    except ValidationError as error:
        raise RunError(f"{root.uri}/report.json: not the report of a run: {error}") from None
