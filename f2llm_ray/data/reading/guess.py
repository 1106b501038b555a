"""Which columns of a user's table hold query, passage, negatives, language: a guess that says why, or a refusal.

Names decide first; where they say nothing and two columns hold text, the one of shorter texts is the query.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import pyarrow as pa

from f2llm_ray.base.errors import DataError
from f2llm_ray.data.language import normal
from f2llm_ray.data.reading.tables import FilePart, Rows, TableFile, no_column

QUERIES = (
    "query", "queries", "question", "anchor", "search_query", "prompt", "input", "sentence1", "sentence_1",
    "text1", "text_a", "source", "src", "title", "headline", "subject", "heading",
)  # fmt: skip
"""Names of queries, the surest first."""
PASSAGES = (
    "passage", "positive", "positives", "pos", "positive_passages", "document", "doc", "context", "answer",
    "answers", "response", "output", "sentence2", "sentence_2", "text2", "text_b", "target", "tgt", "translation",
    "text", "body", "content", "description", "abstract", "paragraph",
)  # fmt: skip
"""The same of passages."""
NEGATIVES = ("negatives", "negative", "neg", "negs", "hard_negatives", "hard_negative", "negative_passages")
NUMBERED = re.compile(r"(.*[a-z_])(\d+)")
"""A column of several, such as negative_1."""
LANGUAGES = ("language", "lang", "query_language", "query_lang", "locale", "source_language", "src_lang")
PASSAGE_LANGUAGES = ("passage_language", "passage_lang", "answer_language", "target_language", "tgt_lang")
IDS = re.compile(r"(.*_)?(id|ids|idx|index|uuid|guid|key|docid|qid|pid|url|uri|link|date|time|timestamp)")
SIDES = ("query", "passage")
SAMPLE_ROWS = 1_000
CLEAR = 1.5
"""How many times longer the texts of a passage must be than those of a query where nothing but length tells."""
LONGEST_NAME = 60
"""Characters; a longer name of a column is more likely the first row of a file without names."""


@dataclass
class Guess:
    """What the columns of a table seem to be."""

    columns: dict[str, str] = field(default_factory=dict)
    """As the recipe's `columns`: what it is, and the name of the column (or a pattern)."""
    why: list[str] = field(default_factory=list)
    """For each, in a phrase."""
    left: list[str] = field(default_factory=list)
    """The columns that are not used."""
    language: str | None = None
    """The language of all rows, where it was given as a code and not as a column."""
    rows: int = 0
    """Rows that were looked at; fewer than `SAMPLE_ROWS` are all there are."""
    texts: list[str] = field(default_factory=list)
    """The distinct queries and passages of these rows, but for those in lists or made by a template."""

    def take(self, role: str, column: str, why: str) -> None:
        """Says what a column is."""
        self.columns[role] = column
        self.why.append(f"{role}: {column!r} ({why})")


def guess_columns(file: TableFile, given: Mapping[str, str | None]) -> Guess:
    """Guesses the columns of a file by its names and first rows.

    Args:
        file: the table.
        given: columns that are known, by what they are: query, passage, negatives, language; each a name, its
            number in a file without names, or a pattern or template as a source's `columns` has them. The language
            may also be a code.

    Raises:
        DataError: the file cannot be read, has no rows or no such column; it is unclear which column is which. The
            message lists the columns and names the flags that decide.
    """
    names, values = _sample(file)
    guess = Guess(rows=len(next(iter(values.values()), [])))
    for role, column in given.items():
        if column is None:
            continue
        if role == "language" and column not in names and normal(column) is not None:
            guess.language = column
            continue
        number = column.isdecimal() and int(column) < len(names)
        if column not in names and not number and not set("*{") & set(column):
            raise no_column(f"{file.place}: --{role}", column, names)
        guess.take(role, column, "given")
    plain = {name: _plain(name) for name in names}
    _negatives(guess, names, plain, values)
    _languages(guess, names, plain, values)
    _sides(guess, names, plain, values, file.place)
    sides = [names[int(c)] if c not in names and c.isdecimal() else c for c in map(guess.columns.get, SIDES) if c]
    found = [text for side in sides for text in values.get(side, ()) if isinstance(text, str)]
    guess.texts = list(dict.fromkeys(found))
    guess.left = [name for name in names if not _used(name, guess)]
    return guess


def _sample(file: TableFile) -> tuple[list[str], dict[str, list[Any]]]:
    """Names of the columns, and the values of the first rows."""
    schema = file.schema()
    wanted = [] if schema is None else schema.names
    part = next(iter(file.parts()), FilePart())
    rows: Rows | None = next(file.read(part, wanted), None)
    if rows is None or not len(rows):
        raise DataError(f"{file.place}: found no rows, expected at least one")
    if isinstance(rows.content, pa.Table):
        records = rows.content.slice(0, SAMPLE_ROWS).to_pylist()
    else:
        records = [row for place, row in enumerate(rows.content[:SAMPLE_ROWS]) if place not in rows.faults]
    if not records:
        rows.refuse_faults()
    return rows.names, {name: [record.get(name) for record in records] for name in rows.names}


def _plain(name: str) -> str:
    """A column's name as the lists above spell them."""
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip()).lower()
    text = re.sub(r"[\s\-.]+", "_", text).strip("_")
    return re.sub(r"_(text|texts|column)$", "", text)


def _negatives(
    guess: Guess, names: Sequence[str], plain: Mapping[str, str], values: Mapping[str, list[Any]]
) -> None:
    if "negatives" in guess.columns:
        return
    for name in names:
        numbered = NUMBERED.fullmatch(plain[name])
        if numbered and numbered[1].strip("_") in NEGATIVES:
            pattern = re.sub(r"\d+$", "*", name)
            guess.take("negatives", pattern, "their names")
            return
    named = [name for wanted in NEGATIVES for name in names if plain[name] == wanted]
    if named and _is_text(values[named[0]], lists=True):
        guess.take("negatives", named[0], "its name")


def _languages(
    guess: Guess, names: Sequence[str], plain: Mapping[str, str], values: Mapping[str, list[Any]]
) -> None:
    for role, usual in (("language", LANGUAGES), ("passage_language", PASSAGE_LANGUAGES)):
        named = [name for wanted in usual for name in names if plain[name] == wanted]
        said = role in guess.columns or (role == "language" and guess.language is not None)
        for name in [] if said else named[:1]:
            found = {value for value in values[name] if isinstance(value, str) and value.strip()}
            if found and all(normal(value) is not None for value in found):
                guess.take(role, name, f"its name, and its values are languages, such as {min(found)!r}")


def _sides(
    guess: Guess,
    names: Sequence[str],
    plain: Mapping[str, str],
    values: Mapping[str, list[Any]],
    place: str,
) -> None:
    free = [name for name in names if not _used(name, guess) and not IDS.fullmatch(plain[name])]
    for role, usual in (("query", QUERIES), ("passage", PASSAGES)):
        named = [name for wanted in usual for name in free if plain[name] == wanted]
        named = [name for name in named if _is_text(values[name], lists=role == "passage")]
        if role not in guess.columns and named:
            guess.take(role, named[0], "its name")
            free.remove(named[0])
    missing = [role for role in ("query", "passage") if role not in guess.columns]
    texts = [name for name in free if _is_text(values[name], lists=False)]
    if not missing:
        return
    if len(missing) == 1 and len(texts) == 1:
        guess.take(missing[0], texts[0], "the only other column of text")
    elif len(missing) == 2 and len(texts) == 2:
        short, long = sorted(texts, key=lambda name: _length(values[name]))
        lengths = f"median {_length(values[short]):.0f} and {_length(values[long]):.0f} characters"
        if _length(values[long]) < CLEAR * _length(values[short]):
            raise DataError(_unclear(place, names, f"two columns of texts alike in length ({lengths})"))
        guess.take("query", short, f"the shorter texts, {lengths}")
        guess.take("passage", long, "the longer texts")
    else:
        found = f"{len(texts)} columns of text that may be {' or '.join(missing)}"
        raise DataError(
            _unclear(place, names, found if texts else f"no column of text for {' and '.join(missing)}")
        )


def _unclear(place: str, names: Sequence[str], found: str) -> str:
    headless = max(map(len, names)) > LONGEST_NAME
    hint = "; where the file has no line of names, use numbers: --query 0 --passage 1" if headless else ""
    return (
        f"{place}: found {found}; the columns are {list(names)}; say which: --query COLUMN --passage COLUMN{hint}"
    )


def _used(name: str, guess: Guess) -> bool:
    """Whether a column is taken: by its name, or by a pattern or template."""
    taken = guess.columns.values()
    return any(
        re.fullmatch(re.escape(text).replace(r"\*", r"\d+"), name) or f"{{{name}}}" in text for text in taken
    )


def _is_text(values: Sequence[Any], *, lists: bool) -> bool:
    """Whether most values are text with letters, or lists of such where those may be."""
    filled = [value for value in values if value not in (None, "", [])]
    fits = [
        _has_letters(value) or (lists and isinstance(value, list) and all(map(_has_letters, value)))
        for value in filled
    ]
    return 2 * sum(fits) > len(filled)


def _has_letters(value: Any) -> bool:
    return isinstance(value, str) and any(map(str.isalpha, value))


def _length(values: Sequence[Any]) -> float:
    return float(median(len(value) for value in values if isinstance(value, str) and value.strip()))
