"""Pairs in files: tables in parquet, JSON lines, CSV or TSV, and the layout of the F2LLM-v2 dataset."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from typing import Literal

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from f2llm_ray.base.errors import DataError
from f2llm_ray.base.section import Output
from f2llm_ray.data.reading.base import BadRow, Piece
from f2llm_ray.data.reading.columns import Columns, finish, listed, texts_of
from f2llm_ray.data.reading.lines import UTF8, Dialect
from f2llm_ray.data.reading.paths_source import PathsSource
from f2llm_ray.data.reading.tables import FilePart, Format, TableFile, check_columns, require_columns
from f2llm_ray.run.folder import Folder

QUERIES = ("query", "anchor", "question")
PASSAGES = ("passage", "positive", "answer", "document")
"""What n-tuples call the two; the first that a file has."""
SMALL_BYTES = 1 << 26
"""Of a .json file that is read whole for its columns."""


class FilesSource(PathsSource):
    """What all sources made of tables share: a row group is a piece, and so is a text file."""

    @property
    def _file_format(self) -> Format:
        return "parquet"

    def _layout(self, names: Sequence[str]) -> Columns:
        """Which column of a file with these names holds what."""
        del names
        return Columns()

    @property
    def _dialect(self) -> Dialect | None:
        return None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """That of the format."""
        return (f".{self._file_format}",)

    def pieces(self, name: str) -> list[Piece]:
        """One per row group or text file; the columns of every file are checked here."""
        pieces: list[Piece] = []
        for file in self.inputs(name):
            table = self._table(name, file.uri)
            schema = table.schema()
            names = () if schema is None else schema.names
            columns = self._layout(names).kinds(names)
            if schema is not None:
                check_columns(schema, columns.items(), table.place)
            parts = table.parts()
            pieces += [{"file": file.uri, "columns": list(columns), **asdict(part)} for part in parts]
        if not pieces:
            raise DataError(f"{table.place}: found no rows, expected at least one")
        return pieces

    def check_columns(self, name: str) -> str | None:
        """As `SourceBase.check_columns`; a .json file is looked at where it is small, since it has no head."""
        file = self.inputs(name)[0]
        table = self._table(name, file.uri)
        if self._file_format == "json" and (file.size or 0) > SMALL_BYTES:
            return f"{table.place}: its columns are checked when it is read, since it is one large array"
        try:
            schema = table.schema()
            names = table.names() if schema is None else schema.names
        except DataError as error:
            if table.file.local is not None:
                raise
            return f"{error}; its columns are checked when it is read"
        if schema is None and not names:
            return f"{table.place}: has no rows; the columns of the other files are checked when they are read"
        columns = self._layout(names)
        if schema is None:  # rows of JSON may lack what a template names
            kinds = (column for column in columns.kinds(names) if column not in {*columns.joined(), *names})
            require_columns((column.partition(".")[0] for column in kinds), names, table.place)
        else:
            check_columns(schema, columns.kinds(names).items(), table.place)
        return None

    def read(self, name: str, piece: Piece, bad_row: BadRow) -> Iterator[pa.Table]:
        """Reads one row group or file, a few thousand rows at a time."""
        table = self._table(name, piece["file"])
        part = FilePart(**{field.name: piece[field.name] for field in fields(FilePart)})
        unseen: set[str] | None = None
        for rows in table.read(part, piece["columns"]):
            layout = self._layout(rows.names)
            unseen = (set(layout.joined()) if unseen is None else unseen) - set(rows.names)
            yield finish(self, name, texts_of(rows, layout), rows, bad_row)
        if unseen is None and len(self.inputs(name)) == 1:
            raise DataError(f"{table.place}: found no rows, expected at least one")
        if unseen:  # a row may lack a key of a template, but a key that all rows lack is a slip in the recipe
            key = repr(min(unseen))
            raise DataError(f"{table.place}: no row has the key {key} of the template, expected it in some")

    def _table(self, name: str, uri: str) -> TableFile:
        return TableFile(Folder.at(uri), self._file_format, f"source {name!r}: {uri}", self._dialect)


class TableSource(FilesSource):
    """Tables with columns of text.

    Of parquet only the columns that are used are read. JSON lines have an object (or an array) per line, a
    .json file is an array of such. CSV has double quotes
    and the delimiter that its first line has most of (comma, tab, semicolon, |), TSV tabs and no quotes; the first
    line has the names of the columns. Text files may be compressed (.gz, .bz2, .zst, .xz).
    """

    format: Output[Literal["parquet", "jsonl", "json", "csv", "tsv"]]
    columns: Columns = Columns()
    delimiter: Output[str | None] = Field(default=None, min_length=1, max_length=1)
    """Of CSV; found by the first lines where unset."""
    names: Output[tuple[str, ...] | None] = Field(default=None, min_length=1)
    """The names of the columns of CSV or TSV files that do not begin with them. Where `columns` has numbers alone,
    such as {query: "0", passage: "1"}, they are those of the columns, and there is no line of names either."""
    quotes: Output[bool] = True
    """Of CSV: whether double quotes are part of the format, and not of the text."""
    encoding: Output[str] = UTF8
    """Of CSV and TSV, by Python's name, such as cp1252 or utf-16."""

    @field_validator("encoding")
    @classmethod
    def _is_encoding(cls, value: str) -> str:
        try:
            b" ".decode(value, errors="ignore")  # refuses what is none of text, such as hex
            return codecs.lookup(value).name
        except LookupError:
            raise ValueError(f"found {value!r}, expected an encoding such as utf-8, cp1252 or utf-16") from None

    @model_validator(mode="after")
    def _has_cells(self) -> TableSource:
        of_cells = ("delimiter", "names", "quotes", "encoding")
        said = [name for name in of_cells if getattr(self, name) != type(self).model_fields[name].default]
        if said and self.format not in ("csv", "tsv"):
            raise ValueError(f"{said[0]}: {self.format} has none; it is for csv and tsv")
        return self

    @property
    def scored(self) -> bool:
        """Whether a column has scores."""
        return self.columns.scores is not None

    def pieces(self, name: str) -> list[Piece]:
        """As of all files; a pattern of negatives has to stand for a column of some file, by its first rows."""
        pieces, said = super().pieces(name), self.columns.negatives
        for pattern in (text for text in ((said,) if isinstance(said, str) else said or ()) if "*" in text):
            found = (self._table(name, file.uri).names() for file in self.inputs(name))
            if not any(listed(pattern, names) for names in found):
                first = self._table(name, pieces[0]["file"])
                raise DataError(
                    f"{first.place}: no column is called {pattern!r} with a number for the *, here or in another "
                    f"file; the columns are {first.names()}"
                )
        return pieces

    @property
    def _file_format(self) -> Format:
        return self.format

    def _layout(self, names: Sequence[str]) -> Columns:
        del names
        return self.columns

    @property
    def _dialect(self) -> Dialect | None:
        if self.format not in ("csv", "tsv"):
            return None
        tabs = self.format == "tsv"
        numbers = all(column.isdecimal() for column in self.columns.kinds())
        names = self.names if self.names is not None or not numbers else ()
        delimiter = "\t" if tabs else self.delimiter
        return Dialect(delimiter, self.quotes and not tabs, names, self.encoding)


class F2llmSource(FilesSource):
    """The F2LLM-v2 dataset: one Parquet file per source with query, passage and negative_1 to negative_n.

    There n is 24 for retrieval and clustering and 1 for classification. It may differ between the files of a
    source, and rows may have fewer: a null or blank negative counts as absent. Tables of n-tuples call the query
    and the passage by other names, the usual ones of which are known.
    """

    format: Output[Literal["f2llm"]] = "f2llm"

    def _layout(self, names: Sequence[str]) -> Columns:
        query, passage = (
            next((name for name in usual if name in names), usual[0]) for usual in (QUERIES, PASSAGES)
        )
        return Columns(query=query, passage=passage, negatives="negative_*")
