"""Parallel text: two files whose lines translate each other, as OPUS and Moses lay them out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, zip_longest
from typing import Literal

import pyarrow as pa

from f2llm_ray.base.errors import DataError
from f2llm_ray.base.section import Content, Output
from f2llm_ray.data.reading.base import BadRow, Piece, SourceBase
from f2llm_ray.data.reading.columns import Columns, finish, texts_of
from f2llm_ray.data.reading.lines import UTF8_MARK, Record
from f2llm_ray.data.reading.paths import find_files
from f2llm_ray.data.reading.tables import TABLE_ROWS, FilePart, Rows, TableFile
from f2llm_ray.data.reading.values import Fault, not_utf8
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import InputFile


class ParallelSource(SourceBase):
    """Line n of one file is the translation of line n of the other; both may be compressed.

    A line that is blank in both is no row. `language` is that of the queries.
    """

    format: Output[Literal["parallel"]] = "parallel"
    queries: Content[str]
    """The file of the queries, such as corpus.de-en.de."""
    passages: Content[str]
    """The file of the passages."""

    def inputs(self, name: str) -> list[InputFile]:
        """The two files."""
        found = []
        for path in (self.queries, self.passages):
            files = list(find_files(path, ("",), f"source {name!r}: {path}").values())
            if len(files) != 1:
                raise DataError(f"source {name!r}: {path}: found {len(files)} files, expected one")
            found += files
        return found

    def pieces(self, name: str) -> list[Piece]:
        """One: lines are known by their numbers."""
        queries, passages = self.inputs(name)
        return [{"file": queries.uri, "passages": passages.uri}]

    def piece_inputs(self, piece: Piece) -> list[str]:
        """Both files."""
        return [piece["file"], piece["passages"]]

    def read(self, name: str, piece: Piece, bad_row: BadRow) -> Iterator[pa.Table]:
        """Reads the lines of both, a few thousand at a time.

        Raises:
            DataError: one file has more lines than the other: from some line on they are no translations.
        """
        place = f"source {name!r}: {piece['file']}"
        first, second = (
            TableFile(Folder.at(piece[key]), "jsonl", f"source {name!r}: {piece[key]}")
            for key in ("file", "passages")
        )
        with first.stream(FilePart()) as queries, second.stream(FilePart()) as passages:
            numbered = enumerate(zip_longest(queries, passages), start=1)
            while chunk := list(islice(numbered, TABLE_ROWS)):
                short = next((number for number, pair in chunk if None in pair), None)
                if short is not None:
                    raise DataError(
                        f"{place}:{short}: found a line in one of {piece['file']} and {piece['passages']} alone, "
                        "expected as many lines in both"
                    )
                lines = [(number, _record(number, *pair)) for number, pair in chunk if any(map(bytes.strip, pair))]
                faults = {row: record for row, (_, record) in enumerate(lines) if isinstance(record, Fault)}
                records: list[Record] = [{} if isinstance(record, Fault) else record for _, record in lines]
                rows = Rows(
                    place, ["query", "passage"], records, lines=[number for number, _ in lines], faults=faults
                )
                yield finish(self, name, texts_of(rows, Columns()), rows, bad_row)


def _record(number: int, query: bytes, passage: bytes) -> Record | Fault:
    texts = {}
    for side, line in (("query", query), ("passage", passage)):
        data = line.removeprefix(UTF8_MARK) if number == 1 else line
        try:
            texts[side] = data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            return not_utf8(error, f"{side}: ", " of the line")
    return texts
