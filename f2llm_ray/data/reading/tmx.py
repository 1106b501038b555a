"""Translation memories: TMX files, read as a stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any, Literal, cast
from xml.parsers import expat

import pyarrow as pa

from f2llm_ray.base.errors import DataError
from f2llm_ray.base.section import Output
from f2llm_ray.data.language import normal
from f2llm_ray.data.reading.base import BadRow, Piece
from f2llm_ray.data.reading.columns import Columns, finish, texts_of
from f2llm_ray.data.reading.lines import Record
from f2llm_ray.data.reading.paths_source import PathsSource
from f2llm_ray.data.reading.tables import READ_BYTES, TABLE_ROWS, FilePart, Rows, TableFile
from f2llm_ray.data.reading.values import Fault
from f2llm_ray.run.folder import Folder

NAMES = ("query", "passage", "language", "passage_language")
CODES = frozenset({"bpt", "ept", "it", "ph", "ut"})
"""Elements of a segment that hold codes of its layout, and no text."""


class TmxSource(PathsSource):
    """A row for each unit with a text in both languages; with several texts in the passage's, one for each.

    A unit without one of the languages is counted, and stops no run. Files may be compressed.
    """

    format: Output[Literal["tmx"]] = "tmx"
    language: Output[str | None] = None
    """Of the queries; the source language that a file says of its units where unset."""
    passage_language: Output[str | None] = None
    """Of the passages; all other languages of a unit where unset."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Those of translation memories."""
        return (".tmx",)

    def pieces(self, name: str) -> list[Piece]:
        """One per file."""
        return [{"file": file.uri} for file in self.inputs(name)]

    def read(self, name: str, piece: Piece, bad_row: BadRow) -> Iterator[pa.Table]:
        """Reads a file, a few thousand rows at a time.

        Raises:
            DataError: no XML, another kind of XML, or one that declares entities.
        """
        place = f"source {name!r}: {piece['file']}"
        columns = Columns(language="language", passage_language="passage_language")
        found = (row for unit in _units(Folder.at(piece["file"]), place) for row in self._rows(unit, place))
        some = False
        while chunk := list(islice(found, TABLE_ROWS)):
            some = True
            faults = {row: record for row, (_, record) in enumerate(chunk) if isinstance(record, Fault)}
            records: list[Record] = [{} if isinstance(record, Fault) else record for _, record in chunk]
            rows = Rows(place, list(NAMES), records, lines=[line for line, _ in chunk], faults=faults)
            yield finish(self, name, texts_of(rows, columns), rows, bad_row)
        if not some:
            raise DataError(f"{place}: found no units, expected at least one")

    def _rows(self, unit: _Unit, place: str) -> Iterator[tuple[int, Record | Fault]]:
        asked = self.language or normal(unit.source)
        if asked is None:  # "*all*", or nothing
            raise DataError(
                f"{place}:{unit.line}: found srclang={unit.source!r}, expected the language that is translated; "
                "set the source's language"
            )
        if unit.unknown is not None:
            message = f"found the entity {unit.unknown!r}, expected text; entities of a DTD are not read"
            yield unit.line, Fault("an unknown entity", message)
            return
        codes = [normal(said) for said, _ in unit.texts]
        own = next((at for at, code in enumerate(codes) if _is(code, asked)), None)
        others = [
            at
            for at, code in enumerate(codes)
            if not _is(code, asked) and (self.passage_language is None or _is(code, self.passage_language))
        ]
        if own is None or not others:
            missing = asked if own is None else self.passage_language or "another language"
            there = ", ".join(said for said, _ in unit.texts) or "none"
            message = f"found texts in {there}, expected one in {missing}"
            yield unit.line, Fault(f"no text in {missing}", message, malformed=False)
            return
        for at in others:
            texts = {"query": unit.texts[own][1], "passage": unit.texts[at][1]}
            yield unit.line, {**texts, "language": unit.texts[own][0], "passage_language": unit.texts[at][0]}


def _is(code: str | None, wanted: str | None) -> bool:
    """Whether a language is the one that is wanted, which stands for all its scripts where it says none."""
    return code is not None and wanted in (code, code.partition("-")[0])


@dataclass
class _Unit:
    """A unit of a translation memory."""

    line: int
    source: str
    """The language that is translated."""
    texts: list[tuple[str, str]] = field(default_factory=list)
    """Language and text of each variant."""
    unknown: str | None = None
    """An entity in a text that the file does not say the meaning of."""


def _units(file: Folder, place: str) -> Iterator[_Unit]:
    """The units of a file, one after the other; nothing of the file is held beside the one that is read."""
    reader = _Reader(place)
    with TableFile(file, "jsonl", place).stream(FilePart()) as stream:
        data = b" "
        while data:
            data = cast(IO[bytes], stream).read(READ_BYTES)
            try:
                reader.parser.Parse(data, not data)
            except expat.ExpatError as error:
                raise DataError(f"{place}: found a file that is not XML ({error}), expected TMX") from None
            while reader.units:
                yield reader.units.popleft()


class _Reader:
    """Expat's handlers, which make units. Entities are not expanded: nobody needs one in a translation memory."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.units: deque[_Unit] = deque()
        self.parser: Any = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text
        self.parser.EntityDeclHandler = self._declared
        self.parser.SkippedEntityHandler = self._skipped
        self._open: list[str] = []
        self._source = ""
        """The language that the header says is translated."""
        self._language = ""
        self._unit: _Unit | None = None
        self._segment: list[str] | None = None
        self._codes = 0
        """How many of the open elements hold codes."""

    def _start(self, name: str, values: dict[str, str]) -> None:
        if not self._open and name != "tmx":
            raise DataError(
                f"{self.place}: found the element {name!r}, expected a TMX file, which begins with tmx"
            )
        self._open.append(name)
        self._codes += name in CODES
        if name == "header":
            self._source = values.get("srclang", "")
        elif name == "tu":
            self._unit = _Unit(self.parser.CurrentLineNumber, values.get("srclang", self._source))
        elif name == "tuv":
            self._language = values.get("xml:lang", values.get("lang", ""))
        elif name == "seg":
            self._segment = []

    def _end(self, name: str) -> None:
        self._open.pop()
        self._codes -= name in CODES
        if name == "seg" and self._unit is not None and self._segment is not None:
            self._unit.texts.append((self._language, "".join(self._segment)))
            self._segment = None
        elif name == "tu" and self._unit is not None:
            self.units.append(self._unit)
            self._unit = None

    def _text(self, text: str) -> None:
        if self._segment is not None and not self._codes:
            self._segment.append(text)

    def _declared(self, name: str, *_: object) -> None:
        raise DataError(f"{self.place}: found the declaration of an entity, {name!r}, expected a TMX file without")

    def _skipped(self, name: str, *_: object) -> None:
        if self._unit is not None and self._segment is not None:
            self._unit.unknown = name
