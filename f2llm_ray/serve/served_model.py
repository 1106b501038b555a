"""The model that is served, found before any replica starts: its folder, limits, card and deployment options."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from click import ClickException
from pydantic import BaseModel, Field, ValidationError, model_validator
from ray.serve.exceptions import RayServeException

from f2llm_ray.base.errors import F2LLMError, RunError
from f2llm_ray.model.checkpoint import CALIBRATION_FILE, load_info
from f2llm_ray.model.dims import EMBEDDING_TYPES
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.root import REPORT
from f2llm_ray.serve.api import ModelCard, Scores, Types
from f2llm_ray.serve.limits import longest_text
from f2llm_ray.serve.search import check_corpus
from f2llm_ray.serve.settings import Access, Limits, Serving

T = TypeVar("T")

SLACK = 256
"""Requests that Serve hands to a replica beyond those that may wait there, so that it is the replica that refuses
them, with our 429, and not Serve with a plain 503."""


class NotServableError(RunError, RayServeException, ClickException):
    """The arguments name nothing that can be served; the message is one sentence.

    Ray Serve shows the message alone of its own exceptions and a stack trace of others (a deployed config), and
    click does the same (`serve run` of an import path).
    """


class Arguments(Access, Limits):
    """Arguments of an application: a run or a model folder, its names, keys, and limits in place of the run's."""

    root: str | None = None
    """Root of a finished run; its report says which model is served and with which limits."""
    model: str | None = None
    """A model folder."""
    name: str | None = None
    """What clients put in `model`; the name in the model folder when unset."""
    aliases: tuple[str, ...] = ()
    """Other names that clients may use, such as that of a model that this one replaces."""
    corpus: str | None = None
    """Folder that `f2llm embed` wrote with this model and with the texts kept; the page at / searches in it."""

    @model_validator(mode="after")
    def _one_of(self) -> Arguments:
        if (self.root is None) == (self.model is None):
            raise ValueError("set exactly one of root and model")
        return self


class ReportModel(BaseModel):
    """A model of a run, as the run's report has it."""

    name: str
    folder: str
    parameters: int | None = None
    scores: Scores = {}
    types: Types = {}


class Report(BaseModel):
    """The parts of a run's report that serving reads."""

    models: list[ReportModel] = Field(min_length=1)
    serving: Serving = Serving()
    created: datetime | None = None


@dataclass(frozen=True)
class ServedModel:
    """A model to serve."""

    uri: str
    """Its folder."""
    settings: Serving
    access: Access
    card: ModelCard
    """Its entry in GET /v1/models."""
    corpus: str | None = None
    """Folder of the demo page's corpus."""

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may put in `model`."""
        return (self.card.id, *self.card.aliases)


def find_model(args: Arguments) -> ServedModel:
    """Finds the model that the arguments name.

    Raises:
        RunError: the arguments name no finished run or no model folder.
    """
    settings, entry, created = Serving(), None, None
    folder = Folder.at(args.model or args.root or "")
    if args.root is not None:
        report = _report(folder)
        settings, created = report.serving, report.created
        entries = {known.name: known for known in report.models}
        wanted = settings.model or report.models[-1].name
        if wanted not in entries:
            raise RunError(f"{folder.uri}/{REPORT}: model {wanted!r} is not one of {', '.join(entries)}")
        entry = entries[wanted]
        folder = folder / entry.folder
    info = load_info(folder)
    settings = with_limits(settings, args)
    calibrated = folder.exists(CALIBRATION_FILE)
    card = ModelCard(
        id=args.name or info.name,
        created=int(time.time() if created is None else created.timestamp()),
        aliases=args.aliases,
        dims=info.dims,
        max_tokens=longest_text(info, settings),
        pooling=info.pooling,
        embedding_types=tuple(kind for kind in EMBEDDING_TYPES if calibrated or kind != "int8"),
        parameters=entry and entry.parameters,
        scores=entry.scores if entry else {},
        types=entry.types if entry else {},
        corpus_rows=0 if args.corpus is None else check_corpus(Folder.at(args.corpus), folder, info),
    )
    corpus = None if args.corpus is None else Folder.at(args.corpus).uri
    return ServedModel(folder.uri, settings, args, card, corpus)


def with_limits(settings: Serving, given: Limits) -> Serving:
    """The settings, with each limit that was given in place of their own."""
    return settings.model_copy(update=given.model_dump(include=set(Limits.model_fields), exclude_unset=True))


def _report(root: Folder) -> Report:
    if not root.exists(REPORT):
        raise RunError(f"{root.uri}: no finished run: it has no {REPORT}; run `f2llm run` first")
    try:
        return Report.model_validate(root.read_json(REPORT))
    except ValidationError as error:
        raise RunError(f"{root.uri}/{REPORT}: not the report of a run: {error}") from None


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
