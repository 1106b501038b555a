"""Queries, a corpus and judgements in files of their own: BEIR's layout, and that of MS MARCO."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal

import pyarrow as pa
from pydantic import model_validator

from f2llm_ray.base.errors import DataError
from f2llm_ray.base.section import Content, Output
from f2llm_ray.data.reading.base import BadRow, Piece, SourceBase
from f2llm_ray.data.reading.columns import Columns, finish, texts_of
from f2llm_ray.data.reading.lines import Dialect, Record
from f2llm_ray.data.reading.paths import find_files, plain_name
from f2llm_ray.data.reading.tables import SUFFIXES, TABLE_ROWS, FilePart, Rows, TableFile
from f2llm_ray.data.reading.values import Fault
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import InputFile

IDS = ("_id", "id", "query-id", "query_id", "qid", "corpus-id", "corpus_id", "pid", "docid")
TEXTS = ("text", "query", "passage", "contents")
TITLE = "title"
QUERY = ("query-id", "query_id", "qid")
PASSAGE = ("corpus-id", "corpus_id", "pid", "docid")
SCORE = "score"
"""How the layouts in use spell a column, most usual first."""
BARE = {
    "texts": {2: ("_id", "text"), 3: ("_id", TITLE, "text"), 4: ("_id", "url", TITLE, "text")},
    "qrels": {
        2: ("query-id", "corpus-id"),
        3: ("query-id", "corpus-id", SCORE),
        4: ("query-id", "0", "corpus-id", SCORE),
    },
}
"""The columns of a file that does not name them, as MS MARCO's, by their number."""


class JudgedSource(SourceBase):
    """A row for each query and a passage that was judged to answer it (score above 0, or no score).

    A judgement of a query or passage that is not there is a malformed row. A title goes before its text. Memory:
    the texts that are judged.
    """

    format: Output[Literal["beir"]] = "beir"
    folder: Content[str | None] = None
    """A folder with queries, corpus and qrels/<split>, as BEIR and the hub have it."""
    split: Output[str] = "train"
    """Which judgements of the folder are read: those of qrels/<split>."""
    queries: Content[str | None] = None
    """In place of a folder: the file of the queries, such as queries.train.tsv."""
    corpus: Content[str | None] = None
    """In place of a folder: the file of the passages."""
    qrels: Content[str | None] = None
    """In place of a folder: the file that says which passage answers which query."""

    @model_validator(mode="after")
    def _one_of(self) -> JudgedSource:
        files = [self.queries, self.corpus, self.qrels]
        if (self.folder is None) == (None in files) or (self.folder is not None and any(files)):
            raise ValueError("set either folder, or queries, corpus and qrels")
        return self

    def inputs(self, name: str) -> list[InputFile]:
        """The files of the queries, of the corpus and of the judgements."""
        return [file for files in self._files(name).values() for file in files]

    def pieces(self, name: str) -> list[Piece]:
        """One, whose rows are the judgements in their order."""
        return [{part: [file.uri for file in files] for part, files in self._files(name).items()}]

    def piece_inputs(self, piece: Piece) -> list[str]:
        """All files."""
        return [uri for part in ("queries", "corpus", "qrels") for uri in piece[part]]

    def read(self, name: str, piece: Piece, bad_row: BadRow) -> Iterator[pa.Table]:
        """Reads the judgements, the texts that they name, and joins them."""
        judged = list(self._judgements(name, piece["qrels"]))
        wanted = {side: {pair[at] for _, *pair in judged} for at, side in enumerate(("queries", "corpus"))}
        found = {
            part: dict(text for uri in piece[part] for text in self._texts(name, uri, ids))
            for part, ids in wanted.items()
        }
        place, numbered = f"source {name!r}: {piece['qrels'][0]}", iter(judged)
        while chunk := list(islice(numbered, TABLE_ROWS)):
            records = [_record(query, passage, found) for _, query, passage in chunk]
            faults = {row: record for row, record in enumerate(records) if isinstance(record, Fault)}
            kept: list[Record] = [{} if isinstance(record, Fault) else record for record in records]
            rows = Rows(place, ["query", "passage"], kept, lines=[line for line, *_ in chunk], faults=faults)
            yield finish(self, name, texts_of(rows, Columns()), rows, bad_row)

    def _files(self, name: str) -> dict[str, list[InputFile]]:
        found = {}
        for part, said in (("queries", self.queries), ("corpus", self.corpus), ("qrels", self.qrels)):
            place = f"source {name!r}: {said or f'{self.folder} ({part})'}"
            if said is not None:
                found[part] = list(find_files(said, SUFFIXES, place).values())
                continue
            wanted = (f"qrels/{self.split}", f"qrels-{self.split}") if part == "qrels" else (part,)
            files = find_files(str(self.folder), SUFFIXES, place)
            found[part] = [file for path, file in files.items() if _stem(path).startswith(wanted)]
            if not found[part]:
                raise DataError(f"{place}: found {sorted(files)}, expected {' or '.join(wanted)} among them")
        return found

    def _judgements(self, name: str, uris: Sequence[str]) -> Iterator[tuple[int, str, str]]:
        """Line, query id and passage id of each judgement that counts."""
        for uri in uris:
            for rows in _rows(name, uri, "qrels"):
                query, passage = _first(rows.names, QUERY, rows.place), _first(rows.names, PASSAGE, rows.place)
                columns = [rows.column(column, "label").to_pylist() for column in (query, passage)]
                scores = rows.column(SCORE, "number").to_pylist() if SCORE in rows.names else [None] * len(rows)
                rows.refuse_faults()
                for row, (asked, answers, score) in enumerate(zip(*columns, scores, strict=True)):
                    if score is None or score > 0:
                        yield rows.lines[row] if rows.lines else rows.first + row, asked, answers

    def _texts(self, name: str, uri: str, wanted: set[str]) -> Iterator[tuple[str, str]]:
        """Id and text of each query or passage that is wanted."""
        for rows in _rows(name, uri, "texts"):
            ids = rows.column(_first(rows.names, IDS, rows.place), "label").to_pylist()
            texts = rows.column(_first(rows.names, TEXTS, rows.place), "text").to_pylist()
            titles = rows.column(TITLE, "text").to_pylist() if TITLE in rows.names else [None] * len(ids)
            for key, title, text in zip(ids, titles, texts, strict=True):
                if key in wanted:
                    yield key, " ".join(part for part in (title, text) if part and part.strip())


def _rows(name: str, uri: str, kind: Literal["texts", "qrels"]) -> Iterator[Rows]:
    """The rows of a table; one without names of columns gets those of MS MARCO."""
    file, place = TableFile.at(Folder.at(uri)), f"source {name!r}: {uri}"
    dialect = _dialect(file, place, BARE[kind]) if file.format in ("csv", "tsv") else None
    table = TableFile(file.file, file.format, place, dialect)
    columns = {*IDS, *TEXTS, TITLE, SCORE}
    for part in table.parts():
        yield from table.read(part, columns)


def _dialect(file: TableFile, place: str, bare: Mapping[int, tuple[str, ...]]) -> Dialect | None:
    """How the cells of a file are written; None where its first line names the columns."""
    numbered = Dialect("\t" if file.format == "tsv" else None, quotes=False, names=())
    first = next(TableFile(file.file, file.format, place, numbered).read(FilePart(), ()), None)
    cells = [] if first is None else [str(cell) for cell in dict(first.content[0]).values()]
    if {*cells} & {*IDS, *QUERY, *PASSAGE}:
        return None
    names = bare.get(len(cells))
    if names is None:
        raise DataError(f"{place}:1: found the columns {cells}, expected one of {', '.join(IDS)} among them")
    return replace(numbered, names=names)


def _first(names: Sequence[str], usual: Sequence[str], place: str) -> str:
    found = next((name for name in usual if name in names), None)
    if found is None:
        raise DataError(f"{place}: found the columns {list(names)}, expected one of {', '.join(usual)}")
    return found


def _record(query: str, passage: str, found: Mapping[str, Mapping[str, str]]) -> Record | Fault:
    for key, part in ((query, "queries"), (passage, "corpus")):
        if key not in found[part]:
            return Fault(f"not in the {part}", f"found the id {key!r}, which is not in the {part}")
    return {"query": found["queries"][query], "passage": found["corpus"][passage]}


def _stem(path: str) -> str:
    """The path of a file without its endings."""
    return plain_name(path).rpartition(".")[0]
