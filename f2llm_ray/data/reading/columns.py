"""Columns of text, checked: what the readers of files and tables share.

A reader gives the texts of its layout as `TEXTS`, with the faults that only it can see (a line that is no
JSON, say); `finish` finds the faults that any layout can have and makes rows of them.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import field_validator

from f2llm_ray.base.errors import DataError
from f2llm_ray.base.section import Output, Section
from f2llm_ray.data.reading.base import BadRow, SourceBase
from f2llm_ray.data.reading.templates import Template, join_columns, template
from f2llm_ray.data.schema import ROW

TABLE_ROWS = 4_096
"""Rows per table: with 24 negatives of 4 kB each a table stays below the 2 GB that Arrow's offsets reach."""

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

Numbers = np.ndarray[Any, np.dtype[np.int64]]


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

    @field_validator("query", "passage", "language", "passage_language")
    @classmethod
    def _is_template(cls, value: str | None) -> str | None:
        if value is not None:
            template(value)
        return value

    label: Output[str | None] = None
    """Class of a row's texts; clustering rows that bring no negatives get texts of other classes."""

    def named(self) -> dict[str, str]:
        """Field of the row to column, for the fields that are one column."""
        templates = self.templates()
        return {field: column for field, column in self if column is not None and field not in templates}

    def templates(self) -> dict[str, Template]:
        """Field of the row to its parts, for the fields that are templates."""
        found = {field: template(text) for field, text in self if text is not None and field != "negatives"}
        return {field: parts for field, parts in found.items() if parts}

    def joined(self) -> list[str]:
        """The columns that templates name, each once."""
        return list(dict.fromkeys(c for parts in self.templates().values() for _, c in parts if c))

    def used(self) -> list[str]:
        """All columns that are read, each once."""
        return list(dict.fromkeys([*self.named().values(), *self.joined()]))


@dataclass(frozen=True)
class Fault:
    """What is wrong with one row."""

    reason: str
    """Short and the same for all such rows: what `drop` says after "read: "."""
    message: str
    """Field, what was found and what was expected."""


def wrong_kind(field: str, column: str, value: object) -> Fault:
    """The fault of a value of another type than the field's."""
    expected = "a list of text" if field == "negatives" else "text"
    found = f"{type(value).__name__} {reprlib.repr(value)}"
    return Fault(f"{field} is not {expected}", f"{column}: found {found}, expected {expected}")


def check_schema(schema: pa.Schema, columns: Columns, place: str) -> None:
    """Checks that a table has the columns, with text in them.

    Raises:
        DataError: a column is missing (the message lists those that are there) or has another type.
    """
    check_names(schema.names, columns, place)
    for field, column in columns.named().items():
        found = schema.field(column).type
        if field == "negatives":
            if not pa.types.is_null(found) and not (_is_list(found) and _is_optional_text(found.value_type)):
                raise DataError(f"{place}: column {column!r}: found {found}, expected a list of text")
        elif not (_is_text(found) if field in {"query", "passage"} else _is_optional_text(found)):
            raise DataError(f"{place}: column {column!r}: found {found}, expected text")
    for column in columns.joined():
        found = schema.field(column).type
        if not _is_optional_text(found):
            raise DataError(f"{place}: column {column!r}: found {found}, expected text")


def check_names(names: list[str], columns: Columns, place: str) -> None:
    """Checks that the columns are there.

    Raises:
        DataError: one is missing; the message lists those that are there.
    """
    for column in columns.used():
        if column not in names:
            raise DataError(f"{place}: no column {column!r}; the columns are {names}")


def texts_of(table: pa.Table, columns: Columns) -> pa.Table:
    """The columns of a checked table as `TEXTS`."""
    named, templates = columns.named(), columns.templates()
    joined = {column: _texts_column(table, column, pa.string()) for column in columns.joined()}
    return pa.table(
        [
            join_columns(joined, templates[field.name])
            if field.name in templates
            else _texts_column(table, named.get(field.name), field.type)
            for field in TEXTS
        ],
        schema=TEXTS,
    )


def lists_of(values: pa.Array, owners: Numbers, rows: int) -> pa.ListArray:
    """Texts as one list per row, null and blank ones left out.

    Args:
        values: the texts, row after row.
        owners: the row of each text, ascending.
        rows: number of rows.
    """
    present = ~_mask(_blank(values))
    offsets = np.zeros(rows + 1, dtype=np.int32)
    np.cumsum(np.bincount(owners[present], minlength=rows), out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), values.filter(pa.array(present)))


def finish(
    source: SourceBase,
    name: str,
    texts: pa.Table,
    place: Callable[[int], str],
    bad_row: BadRow,
    faults: Mapping[int, Fault] | None = None,
) -> pa.Table:
    """Makes rows of texts.

    Args:
        source: the source that they are of.
        name: its name in the recipe.
        texts: a table of `TEXTS`; its bytes may not be UTF-8.
        place: names a row of the table for a person.
        bad_row: as in `SourceBase.read`.
        faults: those that the reader found, by row of the table; the texts of such a row do not matter.

    Raises:
        DataError: the first malformed row, with bad_row="error".
    """
    columns, encoding_faults = _decoded(texts)
    found = {**_empty_faults(columns), **encoding_faults, **(faults or {})}
    if found and bad_row == "error":
        row = min(found)
        raise DataError(f"{place(row)}: {found[row].message}")
    count = len(texts)
    drop: list[str | None] = [None] * count
    for row, fault in found.items():
        drop[row] = f"read: {fault.reason}"
    kept = pa.array([reason is None for reason in drop], pa.bool_())
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
            "negatives": _negatives(columns["negatives"], kept),
            "passage_language": pc.if_else(same, pa.scalar(None, pa.string()), passage_language),
            "label": _filled(columns["label"], None),
            "drop": pa.array(drop, pa.string()),
        },
        schema=ROW,
    )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_optional_text(kind: pa.DataType) -> bool:
    """Text, or the type that a column without any value has."""
    return _is_text(kind) or bool(pa.types.is_null(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _texts_column(table: pa.Table, column: str | None, kind: pa.DataType) -> pa.Array:
    if column is None:
        return pa.nulls(len(table), kind)
    return _whole(table.column(column).cast(kind))


def _whole(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column as one array."""
    if isinstance(column, pa.Array):
        return column
    return (
        column.chunk(0)
        if column.num_chunks == 1
        else pa.concat_arrays(column.chunks or [pa.nulls(0, column.type)])
    )


def _mask(array: pa.Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype=np.bool_)


def _blank(texts: pa.Array) -> pa.Array:
    """Whether each text is null, empty or white space."""
    return pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0), True)


def _filled(languages: pa.Array, default: str | None) -> pa.Array:
    scalar = pa.scalar(default, pa.string())
    return pc.if_else(_blank(languages), scalar, languages)


def _negatives(lists: pa.Array, kept: pa.Array) -> pa.ListArray:
    owners = _mask_free(pc.list_parent_indices(lists))
    wanted = _mask(kept)[owners]
    values = lists.flatten().filter(pa.array(wanted))
    return lists_of(values, owners[wanted], len(lists))


def _mask_free(numbers: pa.Array) -> Numbers:
    return np.asarray(numbers.to_numpy(zero_copy_only=False), dtype=np.int64)


def _empty_faults(columns: Mapping[str, pa.Array]) -> dict[int, Fault]:
    faults: dict[int, Fault] = {}
    for field in ("passage", "query"):  # a row with both faults is known by its query
        texts = columns[field]
        for row in np.flatnonzero(_mask(_blank(texts))).tolist():
            found = "null" if texts[row].as_py() is None else "blank text"
            faults[row] = Fault(f"empty {field}", f"{field}: found {found}, expected text")
    return faults


def _decoded(texts: pa.Table) -> tuple[dict[str, pa.Array], dict[int, Fault]]:
    """The columns, with null where the bytes are not UTF-8, and the faults of those rows."""
    columns: dict[str, pa.Array] = {}
    faults: dict[int, Fault] = {}
    for field in TEXTS.names:
        column = _whole(texts.column(field))
        lists = column if field == "negatives" else None
        values = column if lists is None else lists.flatten()
        owners = np.arange(len(values)) if lists is None else _mask_free(pc.list_parent_indices(lists))
        bad = _undecodable(values)
        for position, error in bad.items():
            faults[int(owners[position])] = Fault(
                "not UTF-8",
                f"{field}: found byte 0x{error.object[error.start]:02x} at byte {error.start + 1}, expected UTF-8",
            )
        if bad:
            good = pa.array([position not in bad for position in range(len(values))])
            values = pc.if_else(good, values, pa.scalar(None, pa.string()))
            column = values if lists is None else lists_of(values, owners, len(column))
        columns[field] = column
    return columns, faults


def _undecodable(values: pa.Array) -> dict[int, UnicodeDecodeError]:
    """Positions of the texts that are not UTF-8; Parquet promises it and Arrow does not check on reading."""
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        errors = {}
        for position, data in enumerate(values.cast(pa.binary()).to_pylist()):
            try:
                (data or b"").decode("utf-8")
            except UnicodeDecodeError as error:
                errors[position] = error
        return errors
    return {}
