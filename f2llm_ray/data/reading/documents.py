"""Folders of documents: a title or heading, and the section that it stands over."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from f2llm_ray.base.optional import require
from f2llm_ray.base.section import Output
from f2llm_ray.data.reading.base import BadRow, Piece
from f2llm_ray.data.reading.columns import Columns, finish, texts_of
from f2llm_ray.data.reading.lines import UTF8, UTF8_MARK, Record
from f2llm_ray.data.reading.paths import plain_name
from f2llm_ray.data.reading.paths_source import PathsSource
from f2llm_ray.data.reading.pdf import SUFFIX as PDF
from f2llm_ray.data.reading.pdf import pdf_document
from f2llm_ray.data.reading.sections import Document, Section, html_document, markdown_document, plain_document
from f2llm_ray.data.reading.tables import FilePart, Rows, TableFile
from f2llm_ray.data.reading.values import Fault, not_utf8
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import InputFile

KINDS: dict[str, Callable[[str], Document]] = {
    ".md": markdown_document,
    ".markdown": markdown_document,
    ".html": html_document,
    ".htm": html_document,
    ".txt": plain_document,
}
CHARSET = re.compile(rb"<meta[^>]{0,100}?charset\s*=\s*[\"']?\s*([\w-]+)", re.IGNORECASE)
HEAD_BYTES = 1024
"""Where a page says its encoding, if it does (HTML, 4.2.5.4)."""


class DocumentsSource(PathsSource):
    """A row for each section of a Markdown, HTML, PDF or plain text file: from its heading to its text.

    Before the heading stands the title of the document, as in "Guide: Installing"; what comes before the first
    heading belongs to the title. Pieces that make no row are counted, and stop no run.
    """

    pieces_per_part: ClassVar[int] = 64

    format: Output[Literal["documents"]] = "documents"
    min_section: Output[int] = Field(default=50, ge=1)
    """Characters, less white space at line ends, of the shortest section."""
    titles: Output[bool] = True
    """Whether the title stands before the headings."""
    instruction: Output[str | None] = "Given the heading of a section, retrieve its text."
    """Said before each query in stages with instructions."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Those of documents."""
        return (*KINDS, PDF)

    def inputs(self, name: str) -> list[InputFile]:
        """The files, and the package that reads PDF, by its version, where there is such a file.

        Raises:
            DataError: a path that matches nothing, all files are empty, or the package is not installed.
        """
        files = super().inputs(name)
        return [*files, _pdf_reader()] if any(_is_pdf(file.uri) for file in files) else files

    def piece_inputs(self, piece: Piece) -> list[str]:
        """The file, and the package that reads it."""
        return [piece["file"], *([_pdf_reader().uri] if _is_pdf(piece["file"]) else [])]

    def pieces(self, name: str) -> list[Piece]:
        """One per file."""
        return [{"file": file.uri} for file in self.inputs(name) if not file.version]

    def read(self, name: str, piece: Piece, bad_row: BadRow) -> Iterator[pa.Table]:
        """Reads a file, whose pieces in their order are rows."""
        yield self._rows(name, piece, bad_row, headless=False)

    def read_passages(self, name: str, piece: Piece, bad_row: BadRow) -> Iterator[pa.Table]:
        """As `read`; a text without heading or title is a row too, and its own query."""
        yield self._rows(name, piece, bad_row, headless=True)

    def _rows(self, name: str, piece: Piece, bad_row: BadRow, *, headless: bool) -> pa.Table:
        place = f"source {name!r}: {piece['file']}"
        found = self._found_in(Folder.at(piece["file"]), place, headless=headless)
        faults = {row: record for row, (_, record) in enumerate(found) if isinstance(record, Fault)}
        records: list[Record] = [{} if isinstance(record, Fault) else record for _, record in found]
        rows = Rows(place, ["query", "passage"], records, lines=[line for line, _ in found], faults=faults)
        return finish(self, name, texts_of(rows, Columns()), rows, bad_row)

    def _found_in(self, file: Folder, place: str, *, headless: bool) -> list[tuple[int, Record | Fault]]:
        """Line of each piece of a document, and what it makes."""
        name = plain_name(file.path).lower()
        with TableFile(file, "jsonl", place).stream(FilePart()) as stream:
            data = b"".join(stream)
        document = pdf_document(data) if name.endswith(PDF) else _parsed(data, name)
        if isinstance(document, Fault):
            return [(1, document)]
        found = [(section.line, self._row(document, section, headless=headless)) for section in document.sections]
        return found or [(1, Fault("no text", "found no text", malformed=False))]

    def _row(self, document: Document, section: Section, *, headless: bool) -> Record | Fault:
        title, heading = document.title, section.heading
        query = heading if not title or heading == title or not self.titles else f"{title}: {heading}"
        query = query if heading else title
        size = len(" ".join(section.text.split()))
        if not size:
            return Fault("a heading without text", f"found no text under {heading!r}", malformed=False)
        if not query and not headless:
            return Fault("no heading", "found a text before any heading", malformed=False)
        if size < self.min_section:
            message = f"found {size} characters, expected min_section ({self.min_section}) or more"
            return Fault("section too short", message, malformed=False)
        return {"query": query or section.text, "passage": section.text}


def _is_pdf(uri: str) -> bool:
    """Whether a file is PDF, by its name; behind that a URI may carry options."""
    return plain_name(uri.partition("?")[0] if "://" in uri else uri).lower().endswith(PDF)


def _pdf_reader() -> InputFile:
    return InputFile("package:pypdf", None, require("pypdf", extra="pdf").__version__)


def _parsed(data: bytes, name: str) -> Document | Fault:
    """The document of a file of text, by the ending of its name; others are plain text."""
    parse = next((KINDS[ending] for ending in KINDS if name.endswith(ending)), plain_document)
    text = _decoded(data, html=parse is html_document)
    return text if isinstance(text, Fault) else parse(text)


def _decoded(data: bytes, *, html: bool) -> str | Fault:
    """The text of a file: UTF-8, what its mark says, or what a page says of itself."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    said = CHARSET.search(data[:HEAD_BYTES]) if html and not data.startswith(UTF8_MARK) else None
    encoding = UTF8 if said is None else said.group(1).decode("ascii")
    try:
        return data.removeprefix(UTF8_MARK).decode(encoding)
    except UnicodeDecodeError as error:
        return not_utf8(error, suffix=" of the file", encoding=encoding)
    except LookupError:
        return Fault("an unknown encoding", f"found charset={encoding}, expected an encoding that Python knows")
