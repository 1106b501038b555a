"""What all sources share: the settings of an entry, and the two steps of reading."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from f2llm_ray.base.section import Neutral, Output, Section
from f2llm_ray.data.language import CODE, normal
from f2llm_ray.data.schema import ROW, Task
from f2llm_ray.run.inputs import InputFile

BadRow = Literal["error", "skip"]
Piece = dict[str, Any]
"""The smallest part of a source that one worker reads: plain JSON values, so that it travels anywhere."""

DEFAULT_INSTRUCTION: dict[Task, str] = {
    "retrieval": "Given a question, retrieve passages that can help answer the question.",
    "classification": "Classify the topic of the given text.",
    "clustering": "Classify the topic of the given text.",
}


class SourceBase(Section, ABC):
    """Settings that every source has, whatever its layout."""

    pieces_per_part: ClassVar[int] = 1
    """Pieces that one task reads; more than one where pieces are small, such as message catalogs."""

    task: Output[Task] = "retrieval"
    """What the pairs are for: it decides the losses and how negatives are found."""
    language: Output[str | None] = None
    """ISO 639-3 of every query, or "code:<name>"; unset where a column or the reader itself says it. Where nothing
    says it, `data.language_id` fills in what it detects; without it the language stays unknown."""

    passage_language: Output[str | None] = None
    """The same of every passage; the query's where nothing says it."""

    @field_validator("language", "passage_language")
    @classmethod
    def _is_code(cls, value: str | None) -> str | None:
        """A code as rows carry it; those of ISO 639-3 are looked up later, where tables are read."""
        if value is None or re.fullmatch(r"[a-z]{3}(-[A-Z][a-z]{3})?", value):
            return value
        if value.startswith(CODE):
            return normal(value)
        code = normal(value)
        if code is None or not re.fullmatch(r"[A-Za-z]{2,3}([_\-@.].*)?", value):
            meant = "such as deu" if code is None else f"such as {code}"
            raise ValueError(f"found {value!r}, expected an ISO 639 code {meant}")
        return code

    instruction: Output[str | None] = None
    """Said before each query in stages with instructions; the paper's default for the task when unset."""
    cap: Output[int | None] = Field(default=None, ge=1)
    """At most this many rows are kept, drawn by content hash."""
    weight: Neutral[float] = Field(default=1.0, gt=0, le=100)
    """How often a row is seen per epoch: 0.5 takes half of the rows, 2 takes each twice."""
    licence: Neutral[str | None] = None
    """Licence of the text, carried to the model card."""

    @property
    def scored(self) -> bool:
        """Whether rows bring a teacher's scores of their passage and negatives."""
        return False

    @model_validator(mode="after")
    def _scores_rank(self) -> SourceBase:
        if self.scored and self.task != "retrieval":
            raise ValueError(f"columns.scores: scores rank passages, which is for retrieval; task is {self.task}")
        return self

    @property
    def query_instruction(self) -> str:
        """The instruction of this source's queries."""
        return DEFAULT_INSTRUCTION[self.task] if self.instruction is None else self.instruction

    @abstractmethod
    def inputs(self, name: str) -> list[InputFile]:
        """Lists what the source reads, in the order in which it is read.

        Raises:
            DataError: the source is not there.
        """

    def notes(self, name: str) -> list[str]:
        """What a person should know of the source before it is read, such as files that are passed over."""
        del name
        return []

    def check_columns(self, name: str) -> str | None:
        """Looks in the head of the first file for the columns that the recipe names, before any work starts.

        Returns:
            Where it could not look, and why; None where it could, or where the layout has no columns to name.

        Raises:
            DataError: a column is missing, or a file on this machine cannot be read.
        """
        del name
        return None

    def piece_inputs(self, piece: Piece) -> list[str]:
        """URIs of those of `inputs` that a piece is read from: all, where a piece does not say which."""
        return [piece["file"]] if "file" in piece else [entry.uri for entry in self.inputs("")]

    @abstractmethod
    def pieces(self, name: str) -> list[Piece]:
        """Lists the parts of the source in a fixed order.

        Raises:
            DataError: the source is not there, is empty, or a file lacks a column that the recipe names.
        """

    @abstractmethod
    def read(self, name: str, piece: Piece, bad_row: BadRow) -> Iterator[pa.Table]:
        """Reads one part as tables of `schema.ROW`, in the part's own order.

        Args:
            name: the source's name in the recipe.
            piece: one of `pieces`.
            bad_row: "error" raises at the first malformed row; "skip" keeps its place with `drop` set to
                "read: <reason>" (and empty texts), so that it is counted.

        Raises:
            DataError: a malformed file, or a malformed row with bad_row="error"; names file, row and field.
        """

    def read_passages(self, name: str, piece: Piece, bad_row: BadRow) -> Iterator[pa.Table]:
        """As `read`, for those who want passages without queries: what lacks only a query is a row too."""
        return self.read(name, piece, bad_row)


def rows_table(rows: Iterable[Mapping[str, Any]], *, source: str, task: Task) -> pa.Table:
    """Makes a table of `schema.ROW` from mappings; fields left out are null, negatives left out are []."""
    return pa.Table.from_pylist(
        [{"negatives": [], **row, "source": source, "task": task} for row in rows], schema=ROW
    )
