"""Cleaning: one normal form for every text, and the limits a row must keep. Tags rows, removes none."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.data.language import CODE
from f2llm_ray.data.ragged import filter_beside, lengths_of
from f2llm_ray.data.schema import with_column
from f2llm_ray.data.settings import Data

# Control and format characters that carry no text: C0 and C1 except tab and line ends, the byte-order mark, the
# soft hyphen and the bidirectional marks. Joiners (U+200C, U+200D) stay: Persian and Indic spelling, and emoji,
# need them.
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
# Breaks of no width, which part words in Khmer and Thai; at the ends of a text they part nothing.
_ENDS = " \n\u200b\u2060"
_LINE_END = re.compile(r"\r\n?|[\x0b\x0c\x85]|\u2028|\u2029")
_SPACE = re.compile(r"[^\S\n]+")
_BLANK_LINES = re.compile(r" ?\n ?(?:\n ?)+")
_EDGE = re.compile(r" ?\n ?")

# Tags, comments and declarations, entities, URLs. No part of it can match the same characters in two ways, so that
# its time grows with the length of the text alone.
_MARKUP = re.compile(
    r"<[!?/a-zA-Z][^<>]*>|&(?:[a-zA-Z][a-zA-Z0-9]{1,31}|#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6});"
    r"|(?:(?:https?|ftp)://|www\.)[^\s<>\"]+"
)
REPEAT_CHARS = 32
"""Characters of the shortest text that can fail by repeating one: "..." and "-----" may stand in a label."""


def normalize(text: str) -> str:
    """Unicode NFC, no invisible characters, single spaces, at most one empty line; twice is the same as once."""
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    text = _SPACE.sub(" ", _LINE_END.sub("\n", text))
    text = _BLANK_LINES.sub("\n\n", text)
    text = _EDGE.sub("\n", text)
    return unicodedata.normalize("NFC", text.strip(_ENDS))


def clean(rows: pa.Table, settings: Data) -> pa.Table:
    """Normalises the texts of rows of `schema.ROW`, and tags those that break a limit.

    A negative that is empty after normalising is left out; the row stays. The markup of code is code and no fault.
    """
    columns = [rows[name].to_pylist() for name in ("query", "passage", "negatives", "drop")]
    columns += [
        _is_code(rows["language"]),
        _is_code(pc.coalesce(rows["passage_language"], rows["language"])),
    ]
    queries, passages, negatives, drops = [], [], [], []
    keep: list[bool] = []
    for query, passage, others, drop, query_code, passage_code in zip(*columns, strict=True):
        query_text, passage_text = normalize(query or ""), normalize(passage or "")
        queries.append(query_text)
        passages.append(passage_text)
        normal = [normalize(text) for text in others or []]
        negatives.append([text for text in normal if text])
        keep += map(bool, normal)
        drops.append(
            drop
            or fault("query", query_text, settings, code=query_code)
            or fault("passage", passage_text, settings, code=passage_code)
            or ("clean: query equals passage" if query_text == passage_text else None)
        )
    given, scores = (rows[name].combine_chunks() for name in ("negatives", "negative_scores"))
    rows = with_column(rows, "negative_scores", filter_beside(scores, lengths_of(given), np.array(keep, bool)))
    for name, values in {"query": queries, "passage": passages, "negatives": negatives, "drop": drops}.items():
        rows = with_column(rows, name, values)
    return rows


def repeats_one_character(text: str, share: float) -> bool:
    """Whether one run of a character is more than a share of a text.

    Such a run holds one of the characters that stand that many apart, so only their neighbours are looked at.
    """
    limit = int(share * len(text))  # a run of limit + 1 is more than the share
    step = limit + 1
    for place in range(limit, len(text), step):
        character = text[place]
        if limit and text[place - 1 : place] != character and text[place + 1 : place + 2] != character:
            continue
        before, after = text[max(0, place - limit) : place], text[place : place + step]
        run = len(before) - len(before.rstrip(character)) + len(after) - len(after.lstrip(character))
        if run > limit:
            return True
    return False


def is_markup(text: str, share: float) -> bool:
    """Whether tags, entities and URLs are more than a share of a text's characters, white space not counted."""
    whole = _visible(text)
    return whole - _visible(_MARKUP.sub("", text)) > share * whole


def _visible(text: str) -> int:
    return sum(map(len, text.split()))


def _is_code(languages: pa.ChunkedArray) -> list[bool]:
    return pc.fill_null(pc.starts_with(languages, CODE), False).to_numpy().tolist()


def fault(name: str, text: str, settings: Data, *, code: bool) -> str | None:
    """What is wrong with one normalised text, as the tag of its row; None where it keeps all limits.

    The cheap questions come first, since most texts are short and plain.
    """
    size = len(text)
    if size < settings.min_chars:
        return f"clean: {name} too short"
    if size > settings.max_chars:
        return f"clean: {name} too long"
    if size >= REPEAT_CHARS and repeats_one_character(text, settings.filters.max_repeat):
        return f"clean: {name} repeats one character"
    if ("<" in text or "&" in text or "://" in text or "www." in text) and not code:
        return f"clean: {name} is markup" if is_markup(text, settings.filters.max_markup) else None
    return None
