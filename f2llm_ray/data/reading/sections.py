"""Documents cut into sections: the text under each heading of Markdown, HTML and plain text."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

# No part of these can match the same characters in two ways: their time grows with the length of a text alone.
_ATX = re.compile(r" {0,3}(#{1,6})(?=[ \t]|$)")
_ATX_END = re.compile(r"(?:^|[ \t])#+$")
_UNDERLINE = re.compile(r" {0,3}(=+|-{2,})[ \t]*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_FRONT = re.compile(r"---[ \t]*\n(.*?\n)?(?:---|\.\.\.)[ \t]*(?:\n|$)", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title:(.+)$", re.MULTILINE)
_IMAGE = re.compile(r"!\[[^\[\]\n]*\]\([^()\n]*\)")
_LINK = re.compile(r"\[([^\[\]\n]*)\](?:\([^()\n]*\)|\[[^\[\]\n]*\])")
_PLAIN_BLOCK = re.compile(r"[ \t#>*=+|:.-]")
_TAG = re.compile(r"<(?:(/?)([a-zA-Z][^\s/><]*)|[!?])")
_VALUE = re.compile(r">|=\s*([\"'])")
_EMPHASIS = re.compile(r"[*`]+|(?<!\w)_+|_+(?!\w)")

HEADINGS = {f"h{level}": level for level in range(1, 7)}
CODE = frozenset({"script", "style", "template", "noscript", "svg"})
"""Elements whose text is no text."""
RAW = frozenset({"script", "style", "textarea", "title"})
"""Elements that hold no tags."""
AROUND = CODE | {"nav", "footer", "select", "button"}
"""Elements whose text is no part of the document's."""
INLINE = re.compile(
    "a|abbr|b|bdi|bdo|cite|code|data|del|dfn|em|font|i|img|ins|kbd|label|mark|q|s|samp|small|span|strong|sub|sup|time"
    "|tt|u|var|wbr"
)
"""Elements that do not end a line."""


@dataclass(frozen=True)
class Section:
    """A piece of a document."""

    line: int
    """Where it begins, from 1."""
    level: int
    """Of its heading, from 1; 0 for what stands before the first one."""
    heading: str
    text: str


@dataclass(frozen=True)
class Document:
    """A document and its pieces, which together have all its text."""

    title: str
    """What it says of itself, else its first heading of the first level; empty without either."""
    sections: tuple[Section, ...]


def plain_document(text: str) -> Document:
    """A document of plain text, whose title is a first line that stands alone: nothing else is a heading there."""
    lines = text.splitlines()
    first = next((at for at, line in enumerate(lines) if line.strip()), len(lines))
    alone = first + 1 < len(lines) and not lines[first + 1].strip()
    if not alone:
        return _document("", [Section(first + 1, 0, "", text.strip())])
    return _document("", [Section(first + 1, 1, lines[first].strip(), "\n".join(lines[first + 1 :]).strip())])


def markdown_document(text: str) -> Document:
    """A document of Markdown: headings with # or underlined, but none in code; a title in its front matter.

    Links are read as their text; comments and images are left out.
    """
    front = _FRONT.match(text)
    said = None if front is None else _FRONT_TITLE.search(front.group(1) or "")
    title = "" if said is None else said.group(1).strip().strip("\"'")
    skipped = 0 if front is None else front.group().count("\n")
    body = _without_comments(text if front is None else text[front.end() :])
    return _document(title, _markdown_sections(body.splitlines(), skipped + 1))


def html_document(text: str) -> Document:
    """A page of HTML, without its scripts, navigation and footer."""
    text = _without_comments(text)
    reader = _Reader(AROUND)
    reader.run(text)
    if reader.hidden:  # an element is not closed, and all after it would be lost
        reader = _Reader(CODE)
        reader.run(text)
    return _document(" ".join("".join(reader.title).split()), reader.sections)


def _document(title: str, sections: Iterable[Section]) -> Document:
    kept = tuple(section for section in sections if section.heading or section.text)
    return Document(title or next((section.heading for section in kept if section.level == 1), ""), kept)


def _markdown_sections(lines: list[str], first: int) -> Iterator[Section]:
    level, heading, start = 0, "", first
    body: list[str] = []
    fence = ""
    for number, line in enumerate(lines, start=first):
        mark = _FENCE.match(line)
        if fence:
            body.append(line)
            closes = mark is not None and mark.group(1).startswith(fence) and not line[mark.end() :].strip()
            fence = "" if closes else fence
            continue
        atx, under = _ATX.match(line), _UNDERLINE.match(line)
        if mark is not None:
            fence = mark.group(1)
            body.append(line)
        elif atx is not None:
            yield Section(start, level, heading, _markdown_text(body))
            said = _ATX_END.sub("", line[atx.end() :].strip())
            level, heading, start, body = len(atx.group(1)), _plain(said), number, []
        elif under is not None and _is_paragraph_of_one(body):
            title = body.pop()
            yield Section(start, level, heading, _markdown_text(body))
            level, heading, start, body = 1 if "=" in under.group(1) else 2, _plain(title), number - 1, []
        else:
            body.append(line)
    yield Section(start, level, heading, _markdown_text(body))


def _without_comments(text: str) -> str:
    """The text without HTML comments, whose line ends stay; one that is not closed is none."""
    parts, at = [], 0
    while (start := text.find("<!--", at)) >= 0 and (end := text.find("-->", start)) >= 0:
        parts += [text[at:start], "\n" * text.count("\n", start, end)]
        at = end + len("-->")
    return "".join([*parts, text[at:].replace("<!--", "")])


def _is_paragraph_of_one(body: list[str]) -> bool:
    """Whether the last line is a paragraph by itself, and neither a list, a quote nor a table."""
    before = body[-2].strip() if len(body) > 1 else ""
    return bool(body) and bool(body[-1].strip()) and not before and not _PLAIN_BLOCK.match(body[-1])


def _markdown_text(lines: list[str]) -> str:
    return _LINK.sub(r"\1", _IMAGE.sub("", "\n".join(lines))).strip()


def _plain(heading: str) -> str:
    """A heading without its links and emphasis."""
    return " ".join(_EMPHASIS.sub("", _LINK.sub(r"\1", _IMAGE.sub("", heading))).split())


class _Reader:
    """Collects the sections of a page, less what the elements `around` hold."""

    def __init__(self, around: frozenset[str]) -> None:
        self.around = around
        self.title: list[str] = []
        self.sections: list[Section] = []
        self.hidden = 0
        """How many of the open elements are not read."""
        self._in = ""
        """The heading, or the title, that is open."""
        self._kept = 0
        """How many of the open elements keep their line ends."""
        self._begin(1, 0)

    def run(self, text: str) -> None:
        """Reads a page."""
        for line, kind, value in _events(text):
            if kind == "text":
                self._take(html.unescape(value))
            elif kind == "start":
                self._start(value, line)
            else:
                self._stop(value)
        self._end()

    def _start(self, tag: str, line: int) -> None:
        if tag in self.around:
            self.hidden += 1
        elif tag in HEADINGS and not self.hidden:
            self._end()
            self._begin(line, HEADINGS[tag])
            self._in = tag
        elif tag == "title" and not self.hidden and not self.title:
            self._in = tag
        elif tag == "pre":
            self._kept += 1
        if not INLINE.fullmatch(tag):
            self._text.append("\n")

    def _stop(self, tag: str) -> None:
        if tag in self.around:
            self.hidden = max(0, self.hidden - 1)
        elif tag == self._in:
            self._end_heading()
        elif tag == "pre":
            self._kept = max(0, self._kept - 1)
        if not INLINE.fullmatch(tag):
            self._text.append("\n")

    def _take(self, text: str) -> None:
        if self._in == "title":
            self.title.append(text)
        elif not self.hidden:
            self._text.append(text if self._kept else re.sub(r"\s+", " ", text))

    def _begin(self, line: int, level: int) -> None:
        self._line, self._level, self._heading = line, level, ""
        self._text: list[str] = []

    def _end_heading(self) -> None:
        if self._in in HEADINGS:
            # The sign is that of a link to the heading, as Sphinx and MkDocs set it.
            self._heading, self._text = " ".join("".join(self._text).split()).rstrip("¶ "), []
        self._in = ""

    def _end(self) -> None:
        self._end_heading()
        self.sections.append(Section(self._line, self._level, self._heading, "".join(self._text).strip()))


def _events(text: str) -> Iterator[tuple[int, Literal["start", "end", "text"], str]]:
    """The tags of a page by their names, and the text between them, each with the line that it begins in.

    Python's html.parser takes time that grows with the square of a broken page, and stops at some (3.11).
    """
    at = seen = 0
    line = 1
    absent: set[str] = set()
    while (found := _TAG.search(text, at)) is not None:
        close = _tag_end(text, found.end(), absent)
        if close < 0:  # no tag after this one is closed
            break
        if at < found.start():
            yield line, "text", text[at : found.start()]
        line, seen = line + text.count("\n", seen, found.start()), found.start()
        at, name = close + 1, (found.group(2) or "").lower()
        if name:
            yield line, "end" if found.group(1) else "start", name
        if name in RAW and not found.group(1):
            end = _first(text, f"</{name}", at, absent)
            if end >= 0:  # without it, the rest is no script
                yield line, "text", text[at:end]
                at = end
    yield line, "text", text[at:]


def _tag_end(text: str, at: int, absent: set[str]) -> int:
    """The place of the > that ends a tag, not counting those in quoted values; -1 where there is none."""
    while (found := _VALUE.search(text, at)) is not None:
        quote = found.group(1)
        if quote is None:
            return found.start()
        end = _first(text, quote, found.end(), absent)
        at = found.end() if end < 0 else end + 1
    return -1


def _first(text: str, wanted: str, at: int, absent: set[str]) -> int:
    """The first place of a text in any case, -1 where there is none; `absent` has what is not there any more."""
    if wanted in absent:
        return -1
    found = re.compile(re.escape(wanted), re.IGNORECASE).search(text, at)
    if found is None:
        absent.add(wanted)
        return -1
    return found.start()
