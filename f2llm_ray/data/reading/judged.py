"""Queries, a corpus and judgements in files of their own: BEIR's layout, and that of MS MARCO."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
SCORES = (SCORE, "relevance", "rel", "label")
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
ONE_OF = re.compile(r"/.*|[-_.]?\d+([-_.]of[-_.]\d+)?")
"""What follows a name in the path of one of several files: train-00000-of-00002, train/0."""
Pair = tuple[str, str]
"""The ids of a query and a passage, or of a text and the text."""


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
        judged = {uri: list(self._judgements(name, uri)) for uri in piece["qrels"]}
        named = [pair for found in judged.values() for _, pair in found if not isinstance(pair, Fault)]
        texts = {
            part: _by_id(
                text
                for uri in piece[part]
                for text in self._texts(name, uri, {pair[side] for pair in named}, bad_row)
            )
            for side, part in enumerate(("queries", "corpus"))
        }
        for uri, found in judged.items():
            place, numbered = f"source {name!r}: {uri}", iter(found)
            while chunk := list(islice(numbered, TABLE_ROWS)):
                records = [pair if isinstance(pair, Fault) else _record(*pair, texts) for _, pair in chunk]
                faults = {row: record for row, record in enumerate(records) if isinstance(record, Fault)}
                kept: list[Record] = [{} if isinstance(record, Fault) else record for record in records]
                lines = [line for line, _ in chunk]
                rows = Rows(place, ["query", "passage"], kept, lines=lines, faults=faults)
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
            found[part] = [file for path, file in files.items() if _is_called(path, wanted)]
            if not found[part]:
                raise DataError(f"{place}: found {sorted(files)}, expected {' or '.join(wanted)} among them")
        return found

    def _judgements(self, name: str, uri: str) -> Iterator[tuple[int, Pair | Fault]]:
        """Line, and query id and passage id, of each judgement that counts, or what is wrong with it."""
        for rows in _rows(name, uri, "qrels"):
            query, passage = _first(rows.names, QUERY, rows.place), _first(rows.names, PASSAGE, rows.place)
            columns = [rows.column(column, "label").to_pylist() for column in (query, passage)]
            score = next((spelled for spelled in SCORES if spelled in rows.names), None)
            scores = [None] * len(rows) if score is None else rows.column(score, "number").to_pylist()
            for row, (asked, answers, grade) in enumerate(zip(*columns, scores, strict=True)):
                line = rows.lines[row] if rows.lines else rows.first + row
                if row in rows.faults:
                    yield line, rows.faults[row]
                elif grade is None or grade > 0:
                    yield line, (asked, answers)

    def _texts(self, name: str, uri: str, wanted: set[str], bad_row: BadRow) -> Iterator[Pair]:
        """Id and text of each query or passage that is wanted."""
        for rows in _rows(name, uri, "texts"):
            ids = rows.column(_first(rows.names, IDS, rows.place), "label").to_pylist()
            texts = rows.column(_first(rows.names, TEXTS, rows.place), "text").to_pylist()
            titles = rows.column(TITLE, "text").to_pylist() if TITLE in rows.names else [None] * len(ids)
            if bad_row == "error":
                rows.refuse_faults()
            for key, title, text in zip(ids, titles, texts, strict=True):
                if key in wanted:
                    yield key, " ".join(part for part in (title, text) if part and part.strip())


def _by_id(texts: Iterable[Pair]) -> dict[str, str | None]:
    """The texts by their ids; None for an id that two texts have."""
    found: dict[str, str | None] = {}
    for key, text in texts:
        found[key] = text if found.get(key, text) == text else None
    return found


def _rows(name: str, uri: str, kind: Literal["texts", "qrels"]) -> Iterator[Rows]:
    """The rows of a table; one without names of columns gets those of MS MARCO."""
    file, place = TableFile.at(Folder.at(uri)), f"source {name!r}: {uri}"
    dialect = _dialect(file, place, BARE[kind]) if file.format in ("csv", "tsv") else None
    table = TableFile(file.file, file.format, place, dialect)
    columns = {*IDS, *TEXTS, TITLE, *SCORES}
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


def _record(query: str, passage: str, found: Mapping[str, Mapping[str, str | None]]) -> Record | Fault:
    for key, part in ((query, "queries"), (passage, "corpus")):
        if key not in found[part]:
            return Fault(f"not in the {part}", f"found the id {key!r}, which is not in the {part}")
        if found[part][key] is None:
            message = f"found the id {key!r}, which several texts have in the {part}, expected one"
            return Fault(f"several texts of one id in the {part}", message)
    return {"query": found["queries"][query], "passage": found["corpus"][passage]}


def _is_called(path: str, names: Iterable[str]) -> bool:
    """Whether a file has one of these names but for its endings, or is a part of what has."""
    stem = plain_name(path).rpartition(".")[0]
    return any(stem == name or (stem.startswith(name) and ONE_OF.fullmatch(stem[len(name) :])) for name in names)
