"""Settings of the evaluation: the sets that models are measured on. Sets on disk are in `tasks`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Discriminator, Field, Tag, field_validator

from f2llm_ray.base.section import Content, Name, Neutral, Output, Section
from f2llm_ray.data.reading import Source
from f2llm_ray.evaluate.tasks.labelled import LabelledFile
from f2llm_ray.evaluate.tasks.registry import LABELLED
from f2llm_ray.evaluate.tasks.retrieval_set import FolderSet
from f2llm_ray.evaluate.tasks.task import SetSection


class SourceSet(SetSection):
    """A set made of the pairs of a source. Training rows that hold one of its texts are left out (`screen`)."""

    kind: Output[Literal["retrieval", "bitext"]] = "retrieval"
    """Retrieval: its queries against all its passages. Bitext: a query's passage is its translation, to be found
    among those of its language."""
    source: Source
    """Where the pairs are read from, as an entry of `sources`."""
    passages: Output[int | None] = Field(default=None, ge=2)
    """Only so many of its passages, drawn by content hash, and the queries that they answer: so part of a file
    that is trained on becomes a set that is not."""
    max_queries: Output[int | None] = Field(default=None, ge=1)
    """At most this many queries, drawn by content hash; the passages of the others stay in the search."""


SECTIONS: dict[str, type[Section]] = {
    "folder": FolderSet,
    "source": SourceSet,
    **{kind: task.section for kind, task in LABELLED.items()},
}
"""What an entry may be: by the key that says where it is read from, or by its kind."""


def _section(value: Any) -> str | None:
    """Name of the section that an entry is."""
    if not isinstance(value, dict):
        return type(value).__name__ if isinstance(value, Section) else None
    key = next((key for key in ("folder", "source") if key in value), value.get("kind"))
    return SECTIONS[key].__name__ if key in SECTIONS else None


TAGGED = tuple(Annotated[section, Tag(section.__name__)] for section in SECTIONS.values())
if TYPE_CHECKING:
    EvaluationSet = FolderSet | SourceSet | LabelledFile
else:
    EvaluationSet = Annotated[
        Union[TAGGED],  # noqa: UP007 - there is no operator for a tuple
        Discriminator(
            _section,
            custom_error_type="evaluation_set",
            custom_error_message=(
                f"expected a folder or a source, or a test file and its kind, one of {', '.join(LABELLED)}"
            ),
        ),
    ]


BM25 = "bm25"
"""What the search by words is called among the models."""


def baseline_name(model: str) -> str:
    """What the report calls a baseline: the last part of its path, its name on the hub or at its endpoint."""
    last = re.split(r"[/#]", model.rstrip("/"))[-1]
    return re.sub(r"[^A-Za-z0-9_.-]", "-", last).lstrip("-.")


class Evaluation(Section):
    """What every model of the run is measured on."""

    sets: dict[Name, EvaluationSet] = {}
    """By name. Tables are .parquet, .jsonl, .csv or .tsv, by path or URI; a column `language` (ISO 639-3) gives
    the scores by language."""
    divisors: Output[tuple[Annotated[int, Field(ge=1)], ...]] = (1, 2, 4, 8)
    """The dims measured, as d divided by these; 1, the whole d, is among them."""
    bm25: Neutral[bool] = True
    """Score BM25, a search by words, on each retrieval set beside the models."""
    baselines: Content[tuple[str, ...]] = ()
    """Models from elsewhere that are measured on the sets and shown beside the run's own: model folders (ours or
    of sentence-transformers), names on the hub, or OpenAI-compatible endpoints as URL#NAME, with the key in
    OPENAI_API_KEY."""
    during_training: Neutral[bool] = False
    """Measure each checkpoint as well, in tasks beside training, on CPUs or GPUs that it leaves free."""

    @property
    def models(self) -> dict[str, str]:
        """The baselines by the names that the report gives them."""
        return {baseline_name(model): model for model in self.baselines}

    @field_validator("baselines")
    @classmethod
    def _told_apart(cls, baselines: tuple[str, ...]) -> tuple[str, ...]:
        names = [baseline_name(model) for model in baselines]
        for model, name in zip(baselines, names, strict=True):
            if not name:
                raise ValueError(f"found {model!r}, expected a model folder, a name on the hub or URL#NAME")
            if names.count(name) > 1 or name == BM25:
                others = [other for other in baselines if other != model and baseline_name(other) == name]
                raise ValueError(
                    f"{model!r} would be called {name!r}, as {(others or [BM25])[0]!r} is; leave one out"
                )
        return baselines

    @field_validator("divisors")
    @classmethod
    def _whole(cls, divisors: tuple[int, ...]) -> tuple[int, ...]:
        if 1 not in divisors:
            raise ValueError(f"found {list(divisors)}, expected 1, the whole d, among them")
        return divisors
