"""Values of users' tables: what each kind of column may hold, checked alike in JSON, CSV and Arrow."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.base.errors import DataError

ColumnKind = Literal["text", "texts", "label", "number", "numbers", "any"]
"""What a column holds: text, texts (one or a list), a label (text or a whole number, read as text), a finite
number, numbers (one or a list), or anything of one type. A value may always be null."""

EXPECTED: dict[ColumnKind, str] = {
    "text": "text",
    "texts": "text or a list of text",
    "label": "text or a whole number",
    "number": "a number",
    "numbers": "a number or a list of numbers",
}
# Large strings: a whole CSV file may hold more than the 2 GB that the offsets of plain ones reach.
TYPES: dict[ColumnKind, pa.DataType] = {
    "text": pa.large_string(),
    "texts": pa.list_(pa.large_string()),
    "label": pa.large_string(),
    "number": pa.float64(),
    "numbers": pa.list_(pa.float64()),
}


@dataclass(frozen=True)
class Fault:
    """What is wrong with one row."""

    reason: str
    """Short and the same for all such rows."""
    message: str
    """Column, what was found and what was expected."""
    malformed: bool = True
    """False for what is as its format has it and still makes no row: it is counted, and never stops a run."""

    @property
    def tag(self) -> str:
        """What `drop` says of the row."""
        return f"{'read' if self.malformed else 'clean'}: {self.reason}"


OTHER_LIST = re.compile(r"""\s*\[\s*(['"]).*['"]\s*\]\s*""", re.DOTALL)
"""A cell that a program's list of texts was written to."""
ReadItem = Callable[[Mapping[str, Any]], str | None]
"""What an object in a list of texts reads; None where that is not known."""
Faults = dict[int, Fault]
"""By row of the table."""
Column = tuple[pa.Array, Faults]
"""The values of a column, null in rows with a fault."""


def wrong_kind(column: str, kind: ColumnKind, value: object, field: str | None = None) -> Fault:
    """The fault of a value of another kind than the column's; `field` is what rows call the column."""
    found = "null" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"
    message = f"{column}: found {found}, expected {EXPECTED[kind]}"
    return Fault(f"{field or column} is not {EXPECTED[kind]}", message)


def unknown_language(field: str, said: str) -> Fault:
    """The fault of a text that names no language."""
    expected = "an ISO 639 code, a locale, an English name or code:<name>"
    return Fault(f"unknown {field}", f"{field}: found {said!r}, expected {expected}")


def not_utf8(error: UnicodeDecodeError, prefix: str = "", suffix: str = "", encoding: str = "utf-8") -> Fault:
    """The fault of bytes that are not in the encoding of their file."""
    found = f"found byte 0x{error.object[error.start]:02x} at byte {error.start + 1}"
    return Fault(f"not {encoding.upper()}", f"{prefix}{found}{suffix}, expected {encoding.upper()}")


def check_type(found: pa.DataType, column: str, kind: ColumnKind, place: str) -> None:
    """Checks the type of an Arrow column of text or numbers; one without any value has none and is of every kind.

    Raises:
        DataError: it is of another kind.
    """
    inner = found.value_type if kind in {"texts", "numbers"} and is_list(found) else found
    if kind == "numbers":
        fits = pa.types.is_floating(inner) or pa.types.is_integer(inner) or pa.types.is_decimal(inner)
    else:
        fits = _is_text(inner) or (inner is not found and pa.types.is_struct(inner))
    if kind in {"text", "texts", "numbers"} and not fits and not pa.types.is_null(inner):
        raise DataError(f"{place}: column {column!r}: found {found}, expected {EXPECTED[kind]}")


def from_python(
    values: Sequence[Any], column: str, kind: ColumnKind, field: str | None = None, item: ReadItem | None = None
) -> Column:
    """A column of JSON values.

    Raises:
        pa.ArrowException: the values of a column of any kind have several types.
    """
    faults = {}
    typed: list[Any] = []
    for row, value in enumerate(values):
        try:
            typed.append(_typed(value, kind, item))
        except (TypeError, ValueError):
            typed.append(None)
            faults[row] = wrong_kind(column, kind, value, field)
    try:
        return pa.array(typed, TYPES.get(kind)), faults
    except UnicodeEncodeError:
        # A JSON escape can hold half of a surrogate pair, as in a text that was cut inside an emoji.
        for row in [row for row, value in enumerate(typed) if not _is_unicode(value)]:
            faults[row] = Fault("not UTF-8", f"{column}: found half of a surrogate pair, expected UTF-8 text")
            typed[row] = None
        return pa.array(typed, TYPES.get(kind)), faults


def from_cells(
    cells: Sequence[str | None],
    column: str,
    kind: ColumnKind,
    field: str | None = None,
    item: ReadItem | None = None,
) -> Column:
    """A column of CSV: lists are JSON, and in a column of any kind texts that all are numbers become numbers."""
    if kind in {"texts", "numbers"}:
        array, faults = from_python([_list_cell(cell) for cell in cells], column, kind, field, item)
        for row, cell in enumerate(cells):  # as pandas writes lists: one negative that reads "['a', 'b']"
            if cell and OTHER_LIST.fullmatch(cell) and array[row].is_valid and array[row].as_py() == [cell]:
                found = f"found {reprlib.repr(cell)}, a list that is not JSON"
                expected = 'expected text or a JSON list such as ["a", "b"]'
                faults[row] = Fault(
                    f"{field or column} is a list that is not JSON", f"{column}: {found}, {expected}"
                )
        return array, faults
    if kind == "any":
        for numbers in (pa.int64(), pa.float64()):
            try:
                return pa.array([cell or None for cell in cells], pa.large_string()).cast(numbers), {}
            except pa.ArrowInvalid:
                continue
    return from_python(cells, column, kind, field)


def from_arrow(
    values: pa.ChunkedArray, column: str, kind: ColumnKind, field: str | None = None, item: ReadItem | None = None
) -> Column:
    """A column of a table, whose type `check_type` has accepted."""
    if kind == "any":
        return values.combine_chunks(), {}
    if kind == "texts" and _is_text(values.type):
        array, faults = from_arrow(values, column, "text", field)
        return _as_lists(array), faults
    if kind == "texts" and is_list(values.type) and pa.types.is_struct(values.type.value_type):
        return from_python(values.to_pylist(), column, kind, field, item)
    array = (values.cast(TYPES[kind]) if kind in {"text", "texts"} else values).combine_chunks()
    faults = {}
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:  # Parquet promises UTF-8 and Arrow does not check on reading
        lists = pa.types.is_list(array.type)
        rows = array.cast(pa.list_(pa.large_binary()) if lists else pa.large_binary()).to_pylist()
        for row, value in enumerate(rows):
            try:
                rows[row] = (
                    [text and text.decode() for text in value] if lists and value else value and value.decode()
                )
            except UnicodeDecodeError as error:
                rows[row], faults[row] = None, not_utf8(error, f"{column}: ")
        array = pa.array(rows, TYPES[kind])
    if kind in {"text", "texts"}:
        return array, faults
    array, wrong = from_python(array.to_pylist(), column, kind, field)
    return array, wrong | faults


def _as_lists(texts: pa.Array) -> pa.Array:
    """Each text as a list of one; null where it is null."""
    lists = pa.ListArray.from_arrays(pa.array(range(len(texts) + 1), pa.int32()), texts)
    return pc.if_else(texts.is_valid(), lists, pa.scalar(None, lists.type))


def _typed(value: Any, kind: ColumnKind, item: ReadItem | None = None) -> Any:
    """A JSON value as `kind` has it, or a ValueError or TypeError."""
    if value is None or kind == "any":
        return value
    if kind == "number":
        return _finite(value)
    if kind == "numbers":
        return [_finite(entry) for entry in (value if isinstance(value, list) else [value])]
    if kind == "texts":
        texts = [_text_of(entry, item) for entry in (value if isinstance(value, list) else [value])]
        if all(isinstance(text, str | None) for text in texts):
            return texts
    elif isinstance(value, str):
        return value
    elif kind == "label" and isinstance(value, int):
        return str(value)
    raise ValueError


def _finite(value: Any) -> float:
    try:
        number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        raise ValueError from None
    if not math.isfinite(number):
        raise ValueError
    return number


def _text_of(entry: Any, item: ReadItem | None) -> Any:
    """The text of an entry of a list; the entry itself where it has none."""
    text = item(entry) if item is not None and isinstance(entry, dict) else None
    return entry if text is None else text


def _list_cell(cell: str | None) -> Any:
    """What a CSV cell with a JSON list holds; null where it is blank, the cell itself where it is another text."""
    if not cell or not cell.strip():
        return None
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    return value if isinstance(value, list) else cell


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_text(found: pa.DataType) -> bool:
    kind = found.value_type if pa.types.is_dictionary(found) else found
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_list(found: pa.DataType) -> bool:
    """Whether values of a type are lists."""
    return bool(pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found))
