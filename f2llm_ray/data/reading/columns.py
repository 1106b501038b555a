"""Columns of text made into rows: what the sources that read files and tables share.

A field may be made of several columns, by a template such as "{title}: {body}".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, reduce
from string import Formatter
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import field_validator

from f2llm_ray.base.section import Output, Section
from f2llm_ray.data.language import normal
from f2llm_ray.data.ragged import Ints, filter_beside, filter_lists, lengths_of, list_array
from f2llm_ray.data.reading.base import BadRow, SourceBase
from f2llm_ray.data.reading.tables import Rows
from f2llm_ray.data.reading.values import ColumnKind, Fault, unknown_language
from f2llm_ray.data.schema import ROW, SCORES

TEXT_LIST = pa.list_(pa.string())
TEXTS = pa.schema(
    [
        ("query", pa.string()),
        ("passage", pa.string()),
        ("negatives", TEXT_LIST),
        ("language", pa.string()),
        ("passage_language", pa.string()),
        ("label", pa.string()),
        *((field.name, field.type) for field in SCORES),
    ]
)

LISTS = ("negatives", "item", "scores")
"""Fields of `Columns` that are no column of one text."""
Template = tuple[tuple[str, str | None], ...]
"""Pieces of text, each with the column that follows it, or None."""


class Columns(Section):
    """Which column, or key, holds what.

    A column of what is nested is a path, such as "answers.text.0"; the entries of an array have numbers, from "0".
    Every field but the negatives may also be a template of several columns, such as "{title}: {body}", where a
    doubled brace stands for a brace. What a row has no text for is left empty; a row without text for any of the
    template's columns has an empty field.
    """

    query: Output[str] = "query"
    """The text that is searched with, or the first of two that belong together."""
    passage: Output[str] = "passage"
    """A text, or a list of texts, each of which makes a row with the query."""
    negatives: Output[str | tuple[str, ...] | None] = None
    """A text or a list of texts (in CSV a cell with a text or a JSON list); several columns of them; or a pattern
    such as negative_*, whose columns are taken by their numbers. Null and blank texts are left out."""
    item: Output[str | None] = None
    """What an object in a list of passages or negatives reads, as a template of its keys: "{title} {text}"."""
    language: Output[str | None] = None
    """Language of the query, by any code of ISO 639, locale or English name; the source's `language` where the
    column is unset, null or blank."""
    passage_language: Output[str | None] = None
    """The same of the passage, or "code:<name>"; the query's where unset, null or blank."""
    label: Output[str | None] = None
    """Class of a row's texts, as text or a whole number; clustering rows that bring no negatives get texts of
    other classes."""
    scores: Output[str | tuple[str, ...] | None] = None
    """What a teacher, such as a cross-encoder, says of a row's texts: as many numbers as the row has passages and
    negatives, passages first, in one column with a list, several columns, or a pattern such as score_*."""

    @field_validator("query", "passage", "language", "passage_language", "item")
    @classmethod
    def _is_template(cls, value: str | None) -> str | None:
        if value is not None:
            template(value)
        return value

    def read_item(self, item: Mapping[str, Any]) -> str | None:
        """What an object in a list reads; None without text, or where the recipe does not say what it reads."""
        if self.item is None:
            return None
        texts = [(literal, str(item.get(key) or "") if key else "") for literal, key in template(self.item)]
        return "".join(map("".join, texts)) if any(text.strip() for _, text in texts) else None

    def joined(self) -> list[str]:
        """The columns that templates name."""
        texts = [text for field, text in self if text is not None and field not in LISTS]
        return [column for text in texts for _, column in template(text) if column]

    def kinds(self, names: Sequence[str] = ()) -> dict[str, ColumnKind]:
        """All columns that are read, with what they hold.

        Args:
            names: the columns of the table, where they are known: a pattern stands for some of them.
        """
        plain = [text for field, text in self if text is not None and field not in LISTS and not template(text)]
        kinds: dict[str, ColumnKind] = dict.fromkeys([*plain, *self.joined()], "text")
        if self.label is not None and self.label in plain and self.label not in (self.query, self.passage):
            kinds[self.label] = "label"
        lists: dict[str, ColumnKind] = dict.fromkeys(listed(self.negatives, names), "texts")
        lists |= dict.fromkeys(listed(self.scores, names), "numbers")
        return {**kinds, **({} if template(self.passage) else {self.passage: "texts"}), **lists}


def listed(said: str | Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """The columns that hold the items of a row's list, in their order.

    Args:
        said: a column, several, or a pattern such as negative_*.
        names: the columns of the table.
    """
    columns = (said,) if isinstance(said, str) else said or ()
    return [column for text in columns for column in (_numbered(text, names) if "*" in text else [text])]


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
    """The columns of rows as a table of `TEXTS`; what is wrong with them goes to the rows' faults.

    A row with several passages becomes as many, which are `rows.spread`.
    """
    found: dict[str, pa.Array] = {}
    for field in TEXTS:
        text = getattr(columns, field.name, None)
        if text is None:
            found[field.name] = pa.nulls(len(rows), field.type)
        elif field.name == "negatives":
            found[field.name] = _joined_lists(rows, columns, "negatives", "texts", TEXT_LIST)
        elif parts := template(text):
            texts = {c: rows.column(c, "text", field=field.name).cast(field.type) for _, c in parts if c}
            found[field.name] = join_columns(texts, parts)
        elif field.name == "passage" and rows.has_lists(text):
            found[field.name] = rows.column(text, "texts", field=field.name, required=True, item=columns.read_item)
        else:
            kind: ColumnKind = "label" if field.name == "label" else "text"
            found[field.name] = rows.column(text, kind, field=field.name, required=True).cast(field.type)
    passages = found["passage"]
    if columns.scores is not None:
        found |= _scores(rows, columns, passages, found["negatives"])
    if pa.types.is_list(passages.type):
        # A list without a text is a row without a passage, which is counted.
        empty = pc.fill_null(pc.equal(pc.list_value_length(passages), 0), True)
        passages = pc.if_else(empty, pa.scalar([None], passages.type), passages)
        origin = pc.list_parent_indices(passages)
        of_passages = {"passage": pc.list_flatten(passages).cast(pa.string())}
        if columns.scores is not None:
            of_passages["passage_score"] = pc.list_flatten(found["passage_score"])
        found = {**{name: array.take(origin) for name, array in found.items() if name != "passage"}, **of_passages}
        rows.spread(origin.to_numpy())
    return pa.table([found[name] for name in TEXTS.names], schema=TEXTS)


def _joined_lists(
    rows: Rows, columns: Columns, field: str, kind: Literal["texts", "numbers"], type_: pa.DataType
) -> pa.Array:
    """What each row has in the columns of a list, as one list; null where its only column is null."""
    said = getattr(columns, field)
    required, item = "*" not in "".join(said or ()), columns.read_item if kind == "texts" else None
    lists = [
        rows.column(name, kind, field=field, required=required, item=item).cast(type_)
        for name in listed(said, rows.names)
    ]
    if not lists:
        return pa.nulls(len(rows), type_)
    if len(lists) == 1:
        return lists[0]
    filled = [pc.fill_null(array, pa.scalar([], type_)) for array in lists]
    stacked = pa.concat_arrays(filled)
    row_by_row = np.arange(len(stacked)).reshape(len(lists), len(rows)).T.ravel()
    ordered = stacked.take(pa.array(row_by_row))
    lengths = lengths_of(ordered).reshape(len(rows), len(lists)).sum(axis=1)
    return list_array(ordered.flatten(), lengths)


def _scores(rows: Rows, columns: Columns, passages: pa.Array, negatives: pa.Array) -> dict[str, pa.Array]:
    """The scores of each row's passages, in a list where these are, and of its negatives; null in faulty rows."""
    several = pa.types.is_list(passages.type)
    given = _joined_lists(rows, columns, "scores", "numbers", pa.list_(pa.float32())).to_pylist()
    texts = _counts(passages) if several else np.ones(len(rows), np.int64)
    of_passages, of_negatives = [], []
    for row, (scores, first, others) in enumerate(zip(given, texts, _counts(negatives), strict=True)):
        found = scores or []
        if len(found) != first + others:
            message = (
                f"scores: found {len(found)} numbers, expected {first + others}, one for each passage and negative"
            )
            rows.faults.setdefault(row, Fault("not as many scores as texts", message))
            found = [None] * (first + others)
        of_passages.append(found[:first] or [None])
        of_negatives.append(found[first:])
    score, list_of = (field.type for field in SCORES)
    return {
        "passage_score": pa.array(
            of_passages if several else [first for (first,) in of_passages], list_of if several else score
        ),
        "negative_scores": pa.array(of_negatives, list_of),
    }


def _counts(lists: pa.Array) -> Ints:
    """Items of each list, 0 where it is null."""
    return lengths_of(pc.fill_null(lists, pa.scalar([], lists.type)))


def _numbered(pattern: str, names: Sequence[str]) -> list[str]:
    """The columns that a pattern matches, by the number that its star stands for."""
    matched = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)", 1))
    found = [(int(match.group(1)), name) for name in names if (match := matched.fullmatch(name))]
    return [name for _, name in sorted(found)]


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
    codes = {field: _codes(columns[field], field, rows) for field in ("language", "passage_language")}
    if bad_row == "error":
        rows.refuse_faults()
    drop = [rows.faults[row].tag if row in rows.faults else None for row in range(count)]
    kept = pa.array([reason is None for reason in drop], pa.bool_())
    given = pc.and_(kept, columns["negatives"].is_valid())
    negatives = pc.if_else(given, columns["negatives"], pa.scalar([], TEXT_LIST))
    blank, scores = _blank(negatives.flatten()), columns["negative_scores"]
    if source.scored:
        scores = filter_beside(
            pc.if_else(given, scores, pa.scalar([], scores.type)), lengths_of(negatives), ~blank
        )
    language = _filled(codes["language"], source.language)
    passage_language = _filled(codes["passage_language"], source.passage_language)
    same = pc.fill_null(pc.equal(passage_language, language), False)
    return pa.table(
        {
            "source": pa.repeat(pa.scalar(name), count),
            "task": pa.repeat(pa.scalar(str(source.task)), count),
            "language": language,
            "query": pc.if_else(kept, columns["query"], ""),
            "passage": pc.if_else(kept, columns["passage"], ""),
            "negatives": filter_lists(negatives, ~blank),
            "passage_language": pc.if_else(same, pa.scalar(None, pa.string()), passage_language),
            "label": _filled(columns["label"], None),
            "drop": pa.array(drop, pa.string()),
            "passage_score": columns["passage_score"],
            "negative_scores": scores,
        },
        schema=ROW,
    )


def _blank(texts: pa.Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether each text is null, empty or white space."""
    blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0)
    return np.asarray(pc.fill_null(blank, True).to_numpy(zero_copy_only=False), dtype=np.bool_)


def _codes(languages: pa.Array, field: str, rows: Rows) -> pa.Array:
    """Languages by the codes that rows carry (`language.normal`); what names none is a fault, and null."""
    encoded = pc.dictionary_encode(_filled(languages, None))
    said: list[str] = encoded.dictionary.to_pylist()
    codes = [normal(text) for text in said]
    for place, code in enumerate(codes):
        if code is None:
            fault = unknown_language(field, said[place])
            for row in np.flatnonzero(encoded.indices.fill_null(-1).to_numpy() == place).tolist():
                rows.faults.setdefault(row, fault)
    return pa.array(codes, pa.string()).take(encoded.indices)


def _filled(languages: pa.Array, default: str | None) -> pa.Array:
    return pc.if_else(pa.array(_blank(languages)), pa.scalar(default, pa.string()), languages)
