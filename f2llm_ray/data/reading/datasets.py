"""Pairs in a Hugging Face dataset: from the hub, or a folder that `save_to_disk` wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from f2llm_ray.base.errors import DataError, RunError
from f2llm_ray.base.optional import require
from f2llm_ray.base.section import Content, Output
from f2llm_ray.data.reading.base import BadRow, Piece, SourceBase
from f2llm_ray.data.reading.columns import Columns, finish, texts_of
from f2llm_ray.data.reading.paths import find_files, store_errors
from f2llm_ray.data.reading.tables import TABLE_ROWS, Rows, check_columns, roots
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import InputFile

PIECE_ROWS = 50_000
SAVED = ("dataset_dict.json", "dataset_info.json")
"""The files by which a folder written by `save_to_disk` is known."""


class DatasetsSource(SourceBase):
    """A split of a dataset; a range of rows is a piece. Loading scripts are never run."""

    format: Output[Literal["datasets"]] = "datasets"
    path: Content[str] = Field(min_length=1)
    """Name on the hub, a folder written by `save_to_disk` (local or a URI), or a local copy of one of the hub."""
    config: Output[str | None] = None
    """Configuration (subset) of a hub dataset."""
    split: Output[str] = "train"
    """Which split is read."""
    columns: Columns = Columns()

    @property
    def scored(self) -> bool:
        """Whether a column has scores."""
        return self.columns.scores is not None

    def inputs(self, name: str) -> list[InputFile]:
        """The files of a local folder or a saved dataset; one on the hub is one input, known by its name."""
        folder = _saved_folder(self.path) or _plain_folder(self.path)
        if folder is None:
            return [InputFile(f"datasets:{self.path}", None, self.path)]
        return list(find_files(folder, ("",), f"source {name!r}: {self.path}").values())

    def pieces(self, name: str) -> list[Piece]:
        """One per 50,000 rows."""
        path = _saved_folder(self.path)
        place = f"source {name!r}: {self.path}"
        dataset = self._load(path, place)
        self._check(dataset, place)
        rows = len(dataset)
        if rows == 0:
            raise DataError(f"{place}: found no rows in split {self.split!r}, expected at least one")
        return [
            {"folder": path, "start": start, "stop": min(start + PIECE_ROWS, rows)}
            for start in range(0, rows, PIECE_ROWS)
        ]

    def check_columns(self, name: str) -> str | None:
        """As `SourceBase.check_columns`; nothing is downloaded for it."""
        path, place = _saved_folder(self.path), f"source {name!r}: {self.path}"
        if path is None and _plain_folder(self.path) is None:
            return f"{place}: a dataset on the hub; its columns are checked when it is read"
        self._check(self._load(path, place), place)
        return None

    def _check(self, dataset: Any, place: str) -> None:
        schema, named = dataset.features.arrow_schema, _class_labels(dataset)
        kinds = self.columns.kinds(schema.names).items()
        check_columns(schema, [(column, kind) for column, kind in kinds if column not in named], place)

    def read(self, name: str, piece: Piece, bad_row: BadRow) -> Iterator[pa.Table]:
        """Reads one range of rows."""
        place = f"source {name!r}: {self.path}"
        dataset = self._load(piece["folder"], place)
        read = roots(self.columns.kinds(dataset.column_names))
        columns = [root for root in dataset.column_names if root in read]
        dataset = dataset.select_columns(columns)
        labels = _class_labels(dataset)
        dataset = dataset.with_format("arrow")
        for first in range(piece["start"], piece["stop"], TABLE_ROWS):
            table = dataset[first : min(first + TABLE_ROWS, piece["stop"])]
            for column, feature in labels.items():  # numbers that stand for names
                names = [None if n is None or n < 0 else feature.int2str(n) for n in table[column].to_pylist()]
                table = table.set_column(table.column_names.index(column), column, pa.array(names, pa.string()))
            rows = Rows(place, columns, table, first)
            yield finish(self, name, texts_of(rows, self.columns), rows, bad_row)

    def _load(self, folder: str | None, place: str) -> Any:
        library = require("datasets", extra="datasets")
        failures = (OSError, ValueError, RuntimeError, library.exceptions.DatasetsError)
        try:
            if folder is None:
                return library.load_dataset(
                    _plain_folder(self.path) or self.path, self.config, split=self.split, streaming=False
                )
            dataset = library.load_from_disk(folder)
        except failures as error:
            raise DataError(
                f"{place}: found neither a folder written by save_to_disk nor a dataset that loads: {error}"
            ) from None
        if not isinstance(dataset, library.DatasetDict):
            return dataset
        if self.split not in dataset:
            raise DataError(f"{place}: no split {self.split!r}; the splits are {list(dataset)}")
        return dataset[self.split]


def _class_labels(dataset: Any) -> dict[str, Any]:
    """The columns whose numbers stand for names, each with its feature."""
    return {name: feature for name, feature in dataset.features.items() if hasattr(feature, "int2str")}


def _saved_folder(path: str) -> str | None:
    """The folder, absolute so that any worker finds it, or None where the path is a name on the hub."""
    try:
        folder = Folder.at(path)
        return folder.uri if any(folder.exists(file) for file in SAVED) else None
    except store_errors(RunError):
        return None


def _plain_folder(path: str) -> str | None:
    """A folder of files as the hub has them, absolute; None where the path is none on this machine."""
    return str(Path(path).absolute()) if "://" not in path and Path(path).is_dir() else None
