"""The input of bulk embedding: the units that its files are done in, and the texts and columns of a unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.base.errors import DataError
from f2llm_ray.data.reading.base import BadRow
from f2llm_ray.data.reading.tables import FilePart, Rows, TableFile
from f2llm_ray.data.reading.values import wrong_kind
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import InputFile


@dataclass(frozen=True, kw_only=True)
class Unit(FilePart):
    """The part of a file that one shard is made of."""

    shard: str
    """File name of the shard."""
    file: str
    """Name of the input file below the input folder."""
    uri: str


def units_of(files: Mapping[str, InputFile], numbers: Mapping[str, int], shard_rows: int) -> list[Unit]:
    """The units of the input in its order, of at most `shard_rows` rows but for CSV, TSV and compressed files.

    A JSON lines file is read once for this, to find its lines.

    Args:
        files: the input by name.
        numbers: the number of each file, by which its shards are called.
        shard_rows: rows of a unit.

    Raises:
        DataError: a file cannot be read, or has another suffix than those of tables.
    """
    return [
        Unit(shard=f"{shards_of(numbers[name])}{place:06d}.parquet", file=name, uri=file.uri, **asdict(part))
        for name, file in files.items()
        for place, part in enumerate(TableFile.at(Folder.at(file.uri)).parts(shard_rows))
    ]


def shards_of(number: int) -> str:
    """What the names of a file's shards begin with."""
    return f"shard-{number:05d}-"


class UnitReader:
    """Reads units: their texts, and the columns that go along with the vectors.

    The last row group is kept in memory, since the units of one come one after the other.

    Args:
        column: the column of the texts.
        id_column: the column of the ids; row numbers within the file where there is none.
        keep: further columns that are handed on.
        bad_row: whether a row without text or id is an error, or is left out.
    """

    def __init__(
        self, column: str, id_column: str | None, keep: Sequence[str] = (), bad_row: BadRow = "error"
    ) -> None:
        self.column, self.id_column, self.keep, self.bad_row = column, id_column, tuple(keep), bad_row
        self.columns = list(dict.fromkeys([column, *([] if id_column is None else [id_column]), *keep]))
        self._group: tuple[tuple[str, int], Rows] | None = None

    def read(self, unit: Unit) -> tuple[pa.LargeStringArray, dict[str, pa.Array], int]:
        """Texts of a unit, its other columns by the names that they have in the shard, and rows that are left out.

        Raises:
            DataError: the file cannot be read, has no such column, or a row has no text or no id.
        """
        rows = self._rows(unit)
        self._refuse(rows)
        for name in self.columns:
            if name not in rows.names and (rows.names or len(rows)):  # blank lines have neither rows nor columns
                raise DataError(f"{rows.place}: no column {name!r}; the columns are {rows.names}")
        texts = rows.column(self.column, "text")
        for row in np.flatnonzero(pc.equal(texts.fill_null(""), "")).tolist():
            rows.faults.setdefault(row, wrong_kind(self.column, "text", texts[row].as_py()))
        others = {name: texts if name == self.column else rows.column(name, "any") for name in self.columns}
        if self.id_column is None:
            numbers = np.arange(unit.first_row, unit.first_row + len(rows))
            ids = {"file": pa.repeat(pa.scalar(unit.file), len(rows)), "id": pa.array(numbers, pa.int64())}
        else:
            ids = {"id": others[self.id_column]}
            for row in np.flatnonzero(ids["id"].is_null()).tolist():
                rows.faults.setdefault(row, wrong_kind(self.id_column, "label", None))
        self._refuse(rows)
        columns = ids | {name: _typed(others[name]) for name in self.keep}
        if not rows.faults:
            return texts, columns, 0
        good = pa.array([row not in rows.faults for row in range(len(rows))])
        return texts.filter(good), {name: c.filter(good) for name, c in columns.items()}, len(rows.faults)

    def _refuse(self, rows: Rows) -> None:
        if self.bad_row == "error":
            rows.refuse_faults()

    def _rows(self, unit: Unit) -> Rows:
        table = TableFile.at(Folder.at(unit.uri))
        if unit.row_group is None:
            return table.read_whole(self.columns, unit)
        group = (unit.uri, unit.row_group)
        if self._group is None or self._group[0] != group:
            self._group = None  # the old one goes before the new one comes
            self._group = (group, table.read_whole(self.columns, unit))
        return self._group[1].slice(unit.start, unit.stop)


def _typed(column: pa.Array) -> pa.Array:
    """A column of nothing but nulls is taken for strings, as it is in other shards."""
    return column.cast(pa.string()) if pa.types.is_null(column.type) else column
