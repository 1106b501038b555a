"""Settings of the evaluation: the sets that models are measured on."""

from __future__ import annotations

from pydantic import Field

from f2llm_ray.data.sources import Source
from f2llm_ray.data.sources.base import DEFAULT_INSTRUCTION
from f2llm_ray.section import Section


class FolderSet(Section):
    """A retrieval set on disk in the BEIR layout: queries, corpus and qrels, each .parquet or .jsonl."""

    folder: str
    instruction: str = DEFAULT_INSTRUCTION["retrieval"]
    max_queries: int | None = Field(default=None, ge=1)


class SourceSet(Section):
    """A retrieval set made of a source that is never trained on: its queries against all its passages."""

    source: Source
    max_queries: int | None = Field(default=None, ge=1)
    """At most this many queries, drawn by content hash; the corpus stays whole."""


class Evaluation(Section):
    """What every model of the run is measured on."""

    sets: dict[str, FolderSet | SourceSet] = {}
    divisors: tuple[int, ...] = (1, 2, 4, 8)
    """The dims measured, as d divided by these."""
