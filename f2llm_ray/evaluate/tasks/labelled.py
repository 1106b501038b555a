"""Labelled sets: a table of texts and what is known of them, checked once and kept as parquet in the run.

A kind of task is a subclass, which declares its columns and how it is scored. Every row has a language, "und"
where the table has none; languages are scored apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa

from f2llm_ray.base.errors import DataError
from f2llm_ray.base.section import Content, Output
from f2llm_ray.data.decontaminate import Screened
from f2llm_ray.data.ragged import Ints
from f2llm_ray.data.reading.tables import TableFile, require_columns
from f2llm_ray.data.reading.values import TYPES, ColumnKind
from f2llm_ray.data.schema import text_key
from f2llm_ray.evaluate.metrics.intervals import Values
from f2llm_ray.evaluate.metrics.scores import Measured, by_language, measured, units_table
from f2llm_ray.evaluate.metrics.weighted_metrics import Metrics
from f2llm_ray.evaluate.tables import LANGUAGE, read_table
from f2llm_ray.evaluate.tasks.task import SetSection
from f2llm_ray.evaluate.vectors import DistinctVectors, Embedder
from f2llm_ray.model.dims import Vectors
from f2llm_ray.run.folder import Folder

Columns = dict[str, dict[str, ColumnKind]]
"""By table, which is also a field of the class: its columns but for the language, and what they hold."""


class LabelledFile(SetSection):
    """A labelled set in tables."""

    kind: Output[str]
    """One of `registry.LABELLED`."""
    test: Content[str]
    instruction: Output[str]


class Scoring(NamedTuple):
    """What a set's units are scored by, at any dim."""

    encoded: DistinctVectors
    score: Callable[[Vectors], Mapping[str, Values]]
    """From the vectors cut to a dim to the value of each unit [n], by metric."""
    corpus: int = 0
    """How many texts the units are compared with."""
    target_n: Values | None = None
    """What the values are compared with: grades, labels or classes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledSet(ABC):
    """A set of labelled texts in memory; see `Task`.

    Raises:
        DataError: a table has no rows, or rows that the kind cannot score.
    """

    kind: ClassVar[str]
    section: ClassVar[type[LabelledFile]]
    """The recipe's entry of such a set; its keys are `kind`, `instruction` and the names of the tables."""
    columns: ClassVar[Columns]
    metrics: ClassVar[Metrics]
    asked: ClassVar[tuple[str, ...]] = ("text",)
    """Columns of the test table whose texts must not be trained on, however short they are."""

    name: str
    instruction: str
    """Put before texts for models trained with instructions; "" for none."""
    test: pa.Table
    """What is scored: the kind's columns and `language`."""
    places: Mapping[str, str] = field(default_factory=dict)
    """The files that the tables came from, for messages."""

    def __post_init__(self) -> None:
        if not len(self.test):
            self.refuse("found no rows, expected at least one")
        self.check()

    def check(self) -> None:  # noqa: B027 - most kinds have something to check
        """Raises DataError where rows cannot be scored; by default all rows can."""

    def screened(self) -> Screened:
        """As `Task.screened`."""
        return Screened([text for column in self.asked for text in self.values(column)], [])

    def unit_texts(self) -> list[tuple[str, ...]]:
        """As `Task.unit_texts`."""
        return self.rows(*self.asked)

    @abstractmethod
    def scoring(self, encoder: Embedder) -> Scoring:
        """Encodes all texts."""

    def measure(self, encoder: Embedder, divisors: Sequence[int]) -> Measured:
        """As `Task.measure`."""
        scoring = self.scoring(encoder)
        ids = [text_key("\t".join(map(str, row))).hex() for row in self.rows(*self.columns["test"], "language")]
        return measured(
            self.kind,
            self.metrics,
            units_table(ids, self.languages(), scoring.target_n),
            {dim: scoring.score(cut_ud) for dim, cut_ud in scoring.encoded.at_dims(divisors)},
            corpus=scoring.corpus,
            tokens=scoring.encoded.tokens,
        )

    def write(self, folder: Folder) -> None:
        """As `Task.write`."""
        for name in self.columns:
            table = getattr(self, name)
            if table is not None:
                folder.write_table(f"{name}.parquet", [table], table.schema)
        folder.write_json("set.json", {"kind": self.kind, "name": self.name, "instruction": self.instruction})

    @classmethod
    def read(cls, folder: Folder) -> LabelledSet:
        """As `Task.read`."""
        facts = folder.read_json("set.json")
        # A table that may be missing has a default, which is an attribute of the class.
        tables = (name for name in cls.columns if not hasattr(cls, name) or folder.exists(f"{name}.parquet"))
        files = {name: f"{folder.uri}/{name}.parquet" for name in tables}
        return cls.of_files(files, facts["name"], facts["instruction"])

    @classmethod
    def of_files(cls, files: Mapping[str, str], name: str, instruction: str) -> LabelledSet:
        """Reads the tables of a set, each from its file.

        Raises:
            RunError: a URI cannot be opened.
            DataError: a file, column or row that is not as the kind needs it.
        """
        tables = {table: read_labelled(uri, cls.columns[table]) for table, uri in files.items()}
        return cls(name=name, instruction=instruction, places=files, **tables)

    @classmethod
    def check_columns(cls, files: Mapping[str, str]) -> None:
        """Looks in the head of each table on this machine for the kind's columns.

        Raises:
            DataError: a column is missing, or a file cannot be read.
        """
        for table, uri in files.items():
            file = TableFile.at(Folder.at(uri))
            if file.file.local is not None:
                require_columns(cls.columns[table], file.names(), file.place)

    def values(self, column: str = "text") -> list[Any]:
        """A column of the test table."""
        return self.test[column].to_pylist()

    def rows(self, *columns: str) -> list[tuple[Any, ...]]:
        """Several columns of the test table, row by row."""
        return list(zip(*map(self.values, columns), strict=True))

    def languages(self) -> list[str]:
        """The language of each row."""
        return self.values("language")

    def by_language(self) -> dict[str, Ints]:
        """Rows of each language, sorted by it."""
        return by_language(self.languages())

    def refuse(self, problem: str, row: int | None = None, table: str = "test") -> NoReturn:
        """Raises the error of a row, from 0, or of a whole file."""
        place = self.places.get(table, self.name)
        raise DataError(f"{place}{'' if row is None else f': row {row} (counted from 0)'}: {problem}")


def read_labelled(uri: str, columns: dict[str, ColumnKind]) -> pa.Table:
    """Reads a user's table, or one of ours, into these columns and `language`; raises as `of_files`."""
    folder, _, file = uri.rpartition("/")
    table = read_table(Folder.at(folder or "."), file, known={*columns, *LANGUAGE})
    arrays = {name: pa.array(table.values(kind, name), TYPES[kind]) for name, kind in columns.items()}
    return pa.table({**arrays, "language": pa.array(table.languages(), pa.string())})


def codes(labels: Sequence[str], of: Sequence[str]) -> Values:
    """The place of each label among the distinct ones, sorted."""
    place = {label: float(index) for index, label in enumerate(sorted(set(of)))}
    return np.array([place[label] for label in labels])
