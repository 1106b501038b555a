"""Columns of text made into rows: what the sources that read files and tables share.

A field may be made of several columns, by a template such as "{title}: {body}".
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, reduce
from string import Formatter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import field_validator

from f2llm_ray.base.section import Output, Section
from f2llm_ray.data.ragged import filter_lists
from f2llm_ray.data.reading.base import BadRow, SourceBase
from f2llm_ray.data.reading.tables import Rows
from f2llm_ray.data.reading.values import ColumnKind, Fault
from f2llm_ray.data.schema import ROW

TEXT_LIST = pa.list_(pa.string())
TEXTS = pa.schema(
    [
        ("query", pa.string()),
        ("passage", pa.string()),
        ("negatives", TEXT_LIST),
        ("language", pa.string()),
        ("passage_language", pa.string()),
        ("label", pa.string()),
    ]
)

Template = tuple[tuple[str, str | None], ...]
"""Pieces of text, each with the column that follows it, or None."""


class Columns(Section):
    """Which column, or key, holds what.

    Every field but the negatives may also be a template of several columns, such as "{title}: {body}", where a
    doubled brace stands for a brace. What a row has no text for is left empty; a row without text for any of the
    template's columns has an empty field.
    """

    query: Output[str] = "query"
    passage: Output[str] = "passage"
    negatives: Output[str | None] = None
    """A list of texts (in CSV a cell with a JSON list); null and blank entries are left out."""
    language: Output[str | None] = None
    """ISO 639-3 of the query; the source's `language` where the column is unset, null or blank."""
    passage_language: Output[str | None] = None
    """ISO 639-3 of the passage, or "code:<name>"; the query's where unset, null or blank."""
    label: Output[str | None] = None
    """Class of a row's texts; clustering rows that bring no negatives get texts of other classes."""

    @field_validator("query", "passage", "language", "passage_language")
    @classmethod
    def _is_template(cls, value: str | None) -> str | None:
        if value is not None:
            template(value)
        return value

    def joined(self) -> list[str]:
        """The columns that templates name."""
        texts = [text for field, text in self if text is not None and field != "negatives"]
        return [column for text in texts for _, column in template(text) if column]

    def kinds(self) -> dict[str, ColumnKind]:
        """All columns that are read, with what they hold."""
        plain = [text for field, text in self if text is not None and (field == "negatives" or not template(text))]
        kinds: dict[str, ColumnKind] = dict.fromkeys([*plain, *self.joined()], "text")
        return kinds if self.negatives is None else kinds | {self.negatives: "texts"}


@lru_cache(maxsize=256)
def template(text: str) -> Template:
    """The parts of a template, or () where the text is the name of a column, having no braces.

    Raises:
        ValueError: a brace without its partner, something else than a column's name between two, or no column.
    """
    if "{" not in text and "}" not in text:
        return ()
    problem = "expected a column's name in each pair of braces and nothing else, such as {title}"
    try:
        parts = tuple(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}; {problem}") from None
    named = [column for _, column, form, conversion in parts if column and not form and not conversion]
    if not named or len(named) < sum(column is not None for _, column, _, _ in parts):
        raise ValueError(f"{text!r}: {problem}")
    return tuple((literal, column) for literal, column, _, _ in parts)


def join_columns(columns: Mapping[str, pa.Array], parts: Template) -> pa.Array:
    """What a template makes of each row of text columns; null in rows without text for any of its columns."""
    pieces = [piece for literal, column in parts for piece in (literal, columns[column] if column else "")]
    text = pc.binary_join_element_wise(*pieces, "", null_handling="replace", null_replacement="")
    lengths = [pc.binary_length(pc.ascii_trim_whitespace(columns[column])) for _, column in parts if column]
    some = reduce(pc.or_, [pc.greater(pc.fill_null(length, 0), 0) for length in lengths])
    return pc.if_else(some, text, pa.scalar(None, pa.string()))


def texts_of(rows: Rows, columns: Columns) -> pa.Table:
    """The columns of rows as a table of `TEXTS`; what is wrong with them goes to the rows' faults."""
    found = []
    for field in TEXTS:
        text: str | None = getattr(columns, field.name)
        if text is None:
            found.append(pa.nulls(len(rows), field.type))
        elif field.name == "negatives":
            found.append(rows.column(text, "texts", field=field.name, required=True).cast(field.type))
        elif parts := template(text):
            texts = {c: rows.column(c, "text", field=field.name).cast(field.type) for _, c in parts if c}
            found.append(join_columns(texts, parts))
        else:
            found.append(rows.column(text, "text", field=field.name, required=True).cast(field.type))
    return pa.table(found, schema=TEXTS)


def finish(source: SourceBase, name: str, texts: pa.Table, rows: Rows, bad_row: BadRow) -> pa.Table:
    """Makes rows of `schema.ROW` of a table of `TEXTS`, and looks for those that are empty.

    Raises:
        DataError: the first malformed row, with bad_row="error".
    """
    count = len(texts)
    columns = {field: texts[field].combine_chunks() for field in TEXTS.names}
    for field in ("query", "passage"):  # a row with both faults is known by its query
        for row in np.flatnonzero(_blank(columns[field])).tolist():
            found = "null" if columns[field][row].as_py() is None else "blank text"
            rows.faults.setdefault(row, Fault(f"empty {field}", f"{field}: found {found}, expected text"))
    if bad_row == "error":
        rows.refuse_faults()
    drop = [f"read: {rows.faults[row].reason}" if row in rows.faults else None for row in range(count)]
    kept = pa.array([reason is None for reason in drop], pa.bool_())
    given = pc.and_(kept, columns["negatives"].is_valid())
    negatives = pc.if_else(given, columns["negatives"], pa.scalar([], TEXT_LIST))
    language = _filled(columns["language"], source.language)
    passage_language = _filled(columns["passage_language"], None)
    same = pc.fill_null(pc.equal(passage_language, language), False)
    return pa.table(
        {
            "source": pa.repeat(pa.scalar(name), count),
            "task": pa.repeat(pa.scalar(str(source.task)), count),
            "language": language,
            "query": pc.if_else(kept, columns["query"], ""),
            "passage": pc.if_else(kept, columns["passage"], ""),
            "negatives": filter_lists(negatives, ~_blank(negatives.flatten())),
            "passage_language": pc.if_else(same, pa.scalar(None, pa.string()), passage_language),
            "label": _filled(columns["label"], None),
            "drop": pa.array(drop, pa.string()),
        },
        schema=ROW,
    )


def _blank(texts: pa.Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether each text is null, empty or white space."""
    blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0)
    return np.asarray(pc.fill_null(blank, True).to_numpy(zero_copy_only=False), dtype=np.bool_)


def _filled(languages: pa.Array, default: str | None) -> pa.Array:
    return pc.if_else(pa.array(_blank(languages)), pa.scalar(default, pa.string()), languages)
