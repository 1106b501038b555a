"""Pairs in files: tables in parquet, JSON lines, CSV or TSV, and the layout of the F2LLM-v2 dataset."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from f2llm_ray.base.errors import DataError
from f2llm_ray.base.section import Content, Output
from f2llm_ray.data.ragged import list_array
from f2llm_ray.data.reading.base import BadRow, Piece, SourceBase
from f2llm_ray.data.reading.columns import TEXTS, Columns, finish, texts_of
from f2llm_ray.data.reading.paths import find_files
from f2llm_ray.data.reading.tables import FilePart, Format, Rows, TableFile, check_columns
from f2llm_ray.data.reading.values import ColumnKind
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import InputFile

NEGATIVE = re.compile(r"negative_\d+")


class FilesSource(SourceBase):
    """What all sources made of files share: a row group is a piece, and so is a text file."""

    paths: Content[tuple[str, ...]] = Field(min_length=1)
    """Files, folders or globs (*, [abc], ** over folders), local or any URI that pyarrow or fsspec opens, such as
    s3://bucket/folder or hf://datasets/owner/name/file.parquet (which needs huggingface_hub).
    A folder stands for all the files below it with the format's suffix; hidden ones are left out."""

    @property
    def _file_format(self) -> Format:
        return "parquet"

    @property
    def _layout(self) -> Columns:
        return Columns()

    def inputs(self, name: str) -> list[InputFile]:
        """The files in the order of `paths`, each once, sorted within a folder or glob.

        Raises:
            DataError: a path that matches nothing, or an empty file.
        """
        found: dict[str, InputFile] = {}
        for path in self.paths:
            files = find_files(path, (f".{self._file_format}",), f"source {name!r}: {path}").values()
            found |= {file.uri: found.get(file.uri, file) for file in files}
        for file in found.values():
            if file.size == 0:
                raise DataError(f"source {name!r}: {file.uri}: found an empty file, expected rows")
        return list(found.values())

    def pieces(self, name: str) -> list[Piece]:
        """One per row group or text file; the columns of every file are checked here."""
        pieces: list[Piece] = []
        for file in self.inputs(name):
            table = self._table(name, file.uri)
            schema = table.schema()
            columns = self._layout.kinds() | self._more(schema)
            if schema is not None:
                check_columns(schema, columns.items(), table.place)
            parts = table.parts()
            if not parts:
                raise DataError(f"{table.place}: found no rows, expected at least one")
            pieces += [{"file": file.uri, "columns": list(columns), **asdict(part)} for part in parts]
        return pieces

    def read(self, name: str, piece: Piece, bad_row: BadRow) -> Iterator[pa.Table]:
        """Reads one row group or file, a few thousand rows at a time."""
        table = self._table(name, piece["file"])
        part = FilePart(**{field.name: piece[field.name] for field in fields(FilePart)})
        unseen: set[str] | None = None
        for rows in table.read(part, piece["columns"]):
            unseen = (set(self._layout.joined()) if unseen is None else unseen) - set(rows.names)
            yield finish(self, name, self._texts(rows), rows, bad_row)
        if unseen is None:
            raise DataError(f"{table.place}: found no rows, expected at least one")
        if unseen:  # a row may lack a key of a template, but a key that all rows lack is a slip in the recipe
            key = repr(min(unseen))
            raise DataError(f"{table.place}: no row has the key {key} of the template, expected it in some")

    def _more(self, schema: pa.Schema | None) -> dict[str, ColumnKind]:
        """Further columns of a file that are read."""
        del schema
        return {}

    def _texts(self, rows: Rows) -> pa.Table:
        return texts_of(rows, self._layout)

    def _table(self, name: str, uri: str) -> TableFile:
        return TableFile(Folder.at(uri), self._file_format, f"source {name!r}: {uri}")


class TableSource(FilesSource):
    """Tables with columns of text.

    Of parquet only the columns that are used are read. JSON lines have an object per line. CSV (commas, double
    quotes) and TSV (tabs, no quotes) have the names of the columns in the first line.
    """

    format: Output[Literal["parquet", "jsonl", "csv", "tsv"]]
    columns: Columns = Columns()

    @property
    def _file_format(self) -> Format:
        return self.format

    @property
    def _layout(self) -> Columns:
        return self.columns


class F2llmSource(FilesSource):
    """The F2LLM-v2 dataset: one Parquet file per source with query, passage and negative_1 to negative_n.

    There n is 24 for retrieval and clustering and 1 for classification. It may differ between the files of a
    source, and rows may have fewer: a null or blank negative counts as absent.
    """

    format: Output[Literal["f2llm"]] = "f2llm"

    def _more(self, schema: pa.Schema | None) -> dict[str, ColumnKind]:
        return dict.fromkeys(filter(NEGATIVE.fullmatch, () if schema is None else schema.names), "text")

    def _texts(self, rows: Rows) -> pa.Table:
        """The negatives of each row in the order of their numbers."""
        texts, names = super()._texts(rows), filter(NEGATIVE.fullmatch, rows.names)
        negatives = sorted(names, key=lambda name: int(name.rpartition("_")[2]))
        if not negatives:
            return texts
        stacked = pa.concat_arrays([rows.column(name, "text", field="negatives") for name in negatives])
        row_by_row = np.arange(len(stacked)).reshape(len(negatives), len(rows)).T.ravel()
        values = stacked.take(pa.array(row_by_row)).cast(pa.string())
        lists = list_array(values, np.full(len(rows), len(negatives)))
        return texts.set_column(2, TEXTS.field("negatives"), lists)
