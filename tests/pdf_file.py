"""Small PDF files: lines of text on pages, bookmarks, a title."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

Bookmark = tuple[int, int, str]
"""Level from 1, page from 0, heading."""


def pdf_file(
    pages: Sequence[Sequence[str]],
    bookmarks: Sequence[Bookmark] = (),
    title: str | None = None,
    *,
    encrypted: bool = False,
) -> bytes:
    """A PDF whose pages hold these lines in Helvetica; ASCII without brackets and backslashes."""
    writer = PdfWriter()
    font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica", "/Encoding": "/WinAnsiEncoding"}
    for lines in pages:
        page = writer.add_blank_page(595, 842)
        stream = DecodedStreamObject()
        shown = " 0 -14 Td ".join(f"({line}) Tj" for line in lines)
        stream.set_data(f"BT /F1 12 Tf 72 770 Td {shown} ET".encode("ascii") if lines else b"")
        page[NameObject("/Contents")] = writer._add_object(stream)  # noqa: SLF001 - pypdf's way to add one
        named = DictionaryObject({NameObject(key): NameObject(value) for key, value in font.items()})
        fonts = DictionaryObject({NameObject("/F1"): named})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    above: list[object] = []
    for level, page, heading in bookmarks:
        parent = above[level - 2] if level > 1 else None
        above[level - 1 :] = [writer.add_outline_item(heading, page, parent)]  # type: ignore[arg-type]
    if title is not None:
        writer.add_metadata({"/Title": title})
    if encrypted:
        writer.encrypt("a word", algorithm="RC4-128")
    file = BytesIO()
    writer.write(file)
    return file.getvalue()
