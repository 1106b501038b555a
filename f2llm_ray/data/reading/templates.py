"""Templates: a field of a row made of several columns, as in "{title}: {body}"."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, reduce
from string import Formatter

import pyarrow as pa
import pyarrow.compute as pc

Template = tuple[tuple[str, str | None], ...]
"""Pieces of text, each with the column that follows it, or None."""


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
