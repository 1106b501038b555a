"""Cleaning: one normal form for every text, and the limits a row must keep. Tags rows, removes none."""

from __future__ import annotations

import re
import unicodedata

import pyarrow as pa

from f2llm_ray.recipe import Data

# Control and format characters that carry no text: C0 and C1 except tab and line ends, the byte-order mark, the
# soft hyphen and the bidirectional marks. Joiners (U+200C, U+200D) stay: Persian and Indic spelling, and emoji,
# need them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"
)
_LINE_END = re.compile(r"\r\n?|\x85|\u2028|\u2029")
_SPACE = re.compile(r"[^\S\n]+")
_BLANK_LINES = re.compile(r" ?\n ?(?:\n ?)+")
_EDGE = re.compile(r" ?\n ?")


def normalize(text: str) -> str:
    """Unicode NFC, no invisible characters, single spaces, at most one empty line; twice is the same as once."""
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    text = _SPACE.sub(" ", _LINE_END.sub("\n", text))
    text = _BLANK_LINES.sub("\n\n", text)
    text = _EDGE.sub("\n", text)
    return unicodedata.normalize("NFC", text.strip())


def clean(rows: pa.Table, settings: Data) -> pa.Table:
    """Normalises the texts of rows of `schema.ROW`, and tags those that break a limit.

    A negative that is empty after normalising is left out; the row stays.
    """
    columns = {name: rows[name].to_pylist() for name in ("query", "passage", "negatives", "drop")}
    queries, passages, negatives, drops = [], [], [], []
    for query, passage, others, drop in zip(*columns.values(), strict=True):
        query_text, passage_text = normalize(query or ""), normalize(passage or "")
        queries.append(query_text)
        passages.append(passage_text)
        negatives.append([text for text in map(normalize, others or []) if text])
        drops.append(drop or _fault(query_text, passage_text, settings))
    for name, values in {"query": queries, "passage": passages, "negatives": negatives, "drop": drops}.items():
        index = rows.schema.get_field_index(name)
        rows = rows.set_column(index, rows.schema.field(index), pa.array(values, rows.schema.field(index).type))
    return rows


def _fault(query: str, passage: str, settings: Data) -> str | None:
    for text, name in ((query, "query"), (passage, "passage")):
        if len(text) < settings.min_chars:
            return f"clean: {name} too short"
        if len(text) > settings.max_chars:
            return f"clean: {name} too long"
    return "clean: query equals passage" if query == passage else None
