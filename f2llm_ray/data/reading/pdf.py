"""PDF cut into sections: the text from each entry of the outline (the bookmarks) to the next one.

The words are those of the pages' own text, which a scanned page has none of.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from f2llm_ray.base.optional import require
from f2llm_ray.data.reading.sections import Document, Section
from f2llm_ray.data.reading.values import Fault

if TYPE_CHECKING:
    from pypdf import PdfReader

SUFFIX = ".pdf"
GROUP_CHARS = 2000
"""Without an outline, pages that follow each other make one piece until it is as long as this."""
HEADING_LINES = 3
"""Lines that a heading on a page may take."""
# What programs write as a title that nobody gave: the name of a file, or nothing.
_NO_TITLE = re.compile(
    r"untitled\b.*|microsoft (?:word|powerpoint|excel) - .*|.*\.(?:docx?|odt|pptx?|xlsx?|tex|dvi|indd|pdf|html?)",
    re.IGNORECASE | re.DOTALL,
)
_NUMBER = r"[\d.()]*"
"""That may stand before a heading on the page and not in the outline."""


@dataclass(frozen=True)
class _Entry:
    """An entry of the outline."""

    page: int
    """From 0."""
    level: int
    """From 1."""
    heading: str


def pdf_document(data: bytes) -> Document | Fault:
    """The document that a file holds, or why nothing can be read of it.

    The title is what the file says of itself, or else the only entry at the outline's top. Without an outline
    there are no headings, and pages make pieces of about `GROUP_CHARS` that stand under the title.

    Raises:
        DataError: pypdf is not installed.
    """
    package = require("pypdf", extra="pdf")
    try:
        reader = package.PdfReader(BytesIO(data))
        if reader.is_encrypted:
            return Fault("an encrypted PDF", "found an encrypted PDF, expected one without", malformed=False)
        pages = [_text(page.extract_text()) for page in reader.pages]
        entries, said = list(_entries(reader)), _title(reader)
    except Exception as error:  # noqa: BLE001 - of a damaged file, pypdf raises errors of any class
        message = f"found a PDF that cannot be read ({type(error).__name__}: {error})"
        return Fault("a damaged PDF", message, malformed=False)
    if not any(pages):
        return Fault("a PDF without text", "found pages without text, such as scanned ones", malformed=False)
    top = [entry.heading for entry in entries if entry.level == 1]
    sections = _sections(pages, entries) if entries else _groups(pages)
    kept = tuple(section for section in sections if section.heading or section.text)
    return Document(said or (top[0] if len(top) == 1 else ""), kept)


def _title(reader: PdfReader) -> str:
    title = _words((reader.metadata and reader.metadata.title) or "")
    return "" if _NO_TITLE.fullmatch(title) else title


def _entries(reader: PdfReader) -> Iterator[_Entry]:
    """The outline in the order of the pages; entries that name no page of this file are left out."""

    def flat(level: int, outline: Sequence[Any]) -> Iterator[_Entry]:
        for entry in outline:
            if isinstance(entry, list):
                yield from flat(level + 1, entry)
                continue
            page, heading = reader.get_destination_page_number(entry), _words(entry.title or "")
            if page is not None and page >= 0 and heading:
                yield _Entry(page, level, heading)

    yield from sorted(flat(1, reader.outline), key=lambda entry: entry.page)


def _groups(pages: Sequence[str]) -> Iterator[Section]:
    """Pieces of whole pages, under no heading."""
    group: list[str] = []
    first = 1
    for number, text in enumerate(pages, start=1):
        group.append(text)
        if sum(map(len, group)) >= GROUP_CHARS or number == len(pages):
            yield Section(first, 0, "", "\n\n".join(filter(None, group)))
            group, first = [], number + 1


def _sections(pages: Sequence[str], entries: Sequence[_Entry]) -> Iterator[Section]:
    """The text from each entry's place to that of the next; that before the first one stands under no heading.

    An entry's place is after its words, where they stand in lines of their own on its page. Else it is the page's
    beginning, for the first entry of a page; a further one is left out, and its text belongs to the one before.
    """
    by_page = [text.split("\n") for text in pages]
    lines = [line for page in by_page for line in page]
    starts = [0, *accumulate(map(len, by_page))]
    page, level, heading, at = -1, 0, "", 0
    for entry in entries:
        begin = max(at, starts[entry.page])
        found = _heading_at(lines[begin : starts[entry.page + 1]], entry.heading)
        if found is None and entry.page == page:
            continue
        first, size = found or (0, 0)
        yield Section(max(page, 0) + 1, level, heading, "\n".join(lines[at : begin + first]).strip())
        page, level, heading, at = entry.page, entry.level, entry.heading, begin + first + size
    yield Section(max(page, 0) + 1, level, heading, "\n".join(lines[at:]).strip())


def _heading_at(lines: Sequence[str], heading: str) -> tuple[int, int] | None:
    """The first of the lines that are a heading and nothing else, and how many they are; None without such."""
    wanted = re.compile(_NUMBER + re.escape(_bare(heading)))
    for first in range(len(lines)):
        for size in range(1, HEADING_LINES + 1):
            if lines[first].strip() and wanted.fullmatch(_bare("".join(lines[first : first + size]))):
                return first, size
    return None


def _bare(text: str) -> str:
    """A text by which a heading is known in the outline and on its page: without case and white space."""
    return "".join(text.casefold().split())


def _words(text: str) -> str:
    return " ".join(_text(text).split())


def _text(text: str) -> str:
    """Valid text: of a broken font, half of a surrogate pair may come."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()
