"""Labelled sets: a table of texts and what is known of them, checked once and kept as parquet in the run.

A kind of task is a subclass, which says the columns and how it is measured. Every row has a language, "und" where
the table does not say it; languages are scored apart.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from f2llm_ray.base.errors import DataError
from f2llm_ray.data.decontaminate import Screened
from f2llm_ray.data.schema import text_key
from f2llm_ray.evaluate.encode import Positions
from f2llm_ray.evaluate.metrics.intervals import Values
from f2llm_ray.evaluate.metrics.summary import Units, by_language
from f2llm_ray.evaluate.tables import LANGUAGE, Table, read_file
from f2llm_ray.evaluate.tasks.task import Kind, Measured
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    from f2llm_ray.evaluate.encode import Encoder

Column = Literal["text", "label", "number", "texts"]
"""What a column holds; a label is a text or a whole number."""
READ: dict[Column, tuple[Callable[[Table, str], Sequence[Any]], pa.DataType]] = {
    "text": (Table.texts, pa.string()),
    "label": (Table.ids, pa.string()),
    "number": (Table.numbers, pa.float64()),
    "texts": (Table.text_lists, pa.list_(pa.string())),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledSet(ABC):
    """A set of labelled texts in memory; see `Task`.

    Raises:
        DataError: a table has no rows, or rows that the kind cannot score.
    """

    kind: ClassVar[Kind]
    columns: ClassVar[dict[str, Column]]
    """Of the table, but for the language."""

    name: str
    instruction: str
    """Said before texts to models trained with instructions; "" for none."""
    test: pa.Table
    """What is scored: the kind's columns and `language`."""
    place: str = ""
    """The file that `test` came from, for messages."""

    def __post_init__(self) -> None:
        if not len(self.test):
            raise DataError(f"{self.place}: found no rows, expected at least one")
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Raises DataError where rows cannot be scored."""

    @abstractmethod
    def screened(self) -> Screened:
        """As `Task.screened`."""

    @abstractmethod
    def measure(self, encoder: Encoder, divisors: Sequence[int]) -> Measured:
        """As `Task.measure`."""

    def write(self, folder: Folder) -> None:
        """As `Task.write`."""
        folder.create()
        for name, table in self.tables().items():
            pq.write_table(table, f"{folder.path}/{name}.parquet", filesystem=folder.filesystem)
        folder.write_json("set.json", {"kind": self.kind, "name": self.name, "instruction": self.instruction})

    def tables(self) -> dict[str, pa.Table]:
        """The tables by the names of their files, as the class takes them."""
        return {"test": self.test}

    def values(self, column: str = "text") -> list[Any]:
        """A column of the test table."""
        return self.test[column].to_pylist()

    def languages(self) -> list[str]:
        """The language of each row."""
        return self.test["language"].to_pylist()

    def units(self, target_n: Values | None = None) -> Units:
        """The rows as what is scored; ids are hashes of their content."""
        rows = zip(*(map(str, self.values(name)) for name in (*self.columns, "language")), strict=True)
        return Units([text_key("\t".join(row)).hex() for row in rows], self.languages(), target_n)

    def by_language(self) -> dict[str, Positions]:
        """Rows of each language, sorted by it."""
        return by_language(self.languages())

    def refuse(self, problem: str, row: int | None = None) -> NoReturn:
        """Raises the error of a row, from 0, or of the whole file."""
        raise DataError(f"{self.place}{'' if row is None else f', row {row + 1}'}: {problem}")


def read_labelled(uri: str, columns: dict[str, Column]) -> pa.Table:
    """Reads a user's table, or one of ours, into these columns and `language`.

    Raises:
        RunError: the URI cannot be opened.
        DataError: no such file, not what its suffix says, a missing column or a value of another type.
    """
    table = read_file(uri, {*columns, *LANGUAGE})
    arrays = {name: pa.array(READ[kind][0](table, name), READ[kind][1]) for name, kind in columns.items()}
    return pa.table({**arrays, "language": pa.array(table.languages(), pa.string())})


def codes(labels: Sequence[str], of: Sequence[str]) -> Values:
    """The place of each label among the distinct ones, sorted."""
    place = {label: float(index) for index, label in enumerate(sorted(set(of)))}
    return np.array([place[label] for label in labels])
