"""A recipe for a user's own files: short, with comments, over the built-in `starter`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.base.formatting import share
from f2llm_ray.data.reading.guess import SAMPLE_ROWS, Guess, guess_columns
from f2llm_ray.data.reading.paths import find_files
from f2llm_ray.data.reading.tables import SUFFIXES, TableFile
from f2llm_ray.data.tokens.tokenizer import BYTES_PER_TOKEN, open_tokenizer
from f2llm_ray.recipe.files import load_recipe
from f2llm_ray.report.advice import MANY_CUT
from f2llm_ray.run.folder import Folder

ROLES = ("query", "passage", "negatives", "language", "passage_language")
BASE, BASE_SOURCE, BASE_BATCH = "starter", "pairs", 128
HELD_OUT = "heldout"
"""The evaluation set of held-out files, or of passages that are held out of the files to train on."""
HELD_OUT_SHARE, MOST_HELD_OUT = 0.1, 200
"""Of the rows that were looked at, at most as many passages."""
BACKBONE = """\
backbone: {{path: {path}}}
tokenizer: {{train_vocab: null}} # the backbone's own
stages:
  trained: # a checkpoint wants small steps, and each row once
    {{max_steps: null, epochs: 1, global_batch: {batch}, lr: 5.0e-5, min_lr: 1.0e-6}}
"""
FROM_SCRATCH = """\
# The base, `starter`, trains a small model from scratch: it shows that the data train, and is no strong model.
# For one, start from a checkpoint: `f2llm recipe new FILE --backbone FOLDER_OR_HUB_NAME`, or `adapt-e5-small`.
"""
SMALL = """\
stages:
  trained: {{global_batch: {batch}}} # you have few rows
"""


@dataclass
class NewSource:
    """Files of one layout."""

    format: str
    guess: Guess
    files: list[str] = field(default_factory=list)
    """As the recipe names them."""
    uris: list[str] = field(default_factory=list)
    """The same, each file by itself."""
    rows: int = 0
    """Rows that were looked at."""


@dataclass(frozen=True)
class NewRecipe:
    """What is written, and what a person is told of it."""

    name: str
    text: str
    told: list[str]


def new_recipe(
    paths: Sequence[str],
    given: Mapping[str, str | None],
    *,
    name: str | None = None,
    backbone: str | None = None,
    heldout: str | None = None,
) -> NewRecipe:
    """Looks at files and writes a recipe that trains on their pairs.

    Args:
        paths: files, folders or globs.
        given: columns that are known, by what they are (`guess_columns`).
        name: of the recipe; the first file's when unset.
        backbone: a model folder or a name on the hub to start from; a small random model when unset.
        heldout: a file, folder or glob of pairs that become evaluation sets, one for each layout; when unset,
            passages of the first file are held out of training.

    Raises:
        DataError: no such file, no table, or unclear which column is which.
        RecipeError: the recipe would not be one, or a held-out file is among those to train on.
    """
    sources = _sources(paths, given)
    named: dict[str, NewSource] = {}
    for source in sources:
        named[_free(_name(source.files[0]), named)] = source
    sets: dict[str, NewSource] = {}
    for found in [] if heldout is None else _sources([heldout], given):
        both = sorted({*found.uris} & {uri for source in sources for uri in source.uris})
        if both:
            raise RecipeError(f"--heldout {heldout}: {both[0]} is trained on too; name a file of further pairs")
        sets[_free(HELD_OUT, sets)] = found
    name = name or next(iter(named))
    text = "".join(_lines(name, named, sets, paths, backbone))
    recipe = load_recipe(yaml.safe_load(text))
    told = [line for source in sources for line in _told(source)]
    told += [line for found in sets.values() for line in ("held out, and never trained on:", *_told(found))]
    if not sets:
        told.append(
            f"held out of {sources[0].files[0]}, and never trained on: {_held_out(sources[0].rows)} passages and "
            "their queries (--heldout FILE names pairs of their own)"
        )
    told += _cut([text for source in sources for text in source.guess.texts], recipe.data.max_tokens, backbone)
    return NewRecipe(name, text, told)


def _cut(texts: Sequence[str], max_tokens: int, backbone: str | None) -> list[str]:
    """A warning where much of the texts will be cut: counted by a backbone that is here, else estimated."""
    if not texts:
        return []
    if backbone is not None and Path(backbone).is_dir():
        lengths = [float(len(found.ids)) for found in open_tokenizer(backbone).encode_batch(list(texts))]
        how = f"by the tokenizer of {backbone}"
    else:
        lengths = [len(text.encode()) / BYTES_PER_TOKEN for text in texts]
        how = f"if a token is {BYTES_PER_TOKEN:g} bytes of text"
    cut = sum(length > max_tokens for length in lengths)
    if cut < MANY_CUT * len(texts):
        return []
    told = f"{share(cut, len(texts))} of the texts are longer than data.max_tokens ({max_tokens}) and will be cut"
    return [f"an estimate, {how}: {told}; a larger one in the recipe reads more of them, and takes longer"]


def _sources(paths: Sequence[str], given: Mapping[str, str | None]) -> list[NewSource]:
    """The files by their layouts, in the order in which they were named."""
    found: dict[tuple[str, str], NewSource] = {}
    for path in paths:
        files = find_files(path, SUFFIXES, path).values()
        for file in files:
            table = TableFile.at(Folder.at(file.uri))
            guess = guess_columns(table, given)
            layout = (table.format, str(sorted(guess.columns.items())))
            source = found.setdefault(layout, NewSource(table.format, guess))
            source.files.append(path if len(files) == 1 else file.uri)
            source.uris.append(file.uri)
            source.rows += guess.rows
    return list(found.values())


def _name(file: str) -> str:
    stem = Path(file).name.partition(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or BASE_SOURCE


def _free(name: str, taken: Iterable[str]) -> str:
    names = [name, *(f"{name}-{number}" for number in range(2, 2 + len(list(taken))))]
    return next(found for found in names if found not in taken)


def _told(source: NewSource) -> list[str]:
    more = f" and {len(source.files) - 1} more like it" if len(source.files) > 1 else ""
    rows = f"the first {SAMPLE_ROWS:,} rows" if source.guess.rows == SAMPLE_ROWS else f"{source.guess.rows:,} rows"
    lines = [
        f"{source.files[0]}{more} ({source.format}, {rows} looked at)",
        *(f"  {why}" for why in source.guess.why),
    ]
    return lines + ([f"  not used: {', '.join(map(repr, source.guess.left))}"] if source.guess.left else [])


def _lines(
    name: str,
    sources: Mapping[str, NewSource],
    sets: Mapping[str, NewSource],
    paths: Sequence[str],
    backbone: str | None,
) -> Iterable[str]:
    yield f"# Written by `f2llm recipe new` for {' '.join(' '.join(paths).split())}; docs/own-data.md has more.\n"
    yield "# What a key means: `f2llm recipe explain KEY`. All settings: `f2llm recipe show FILE`.\n"
    if backbone is None:
        yield FROM_SCRATCH
    yield f"extends: {BASE}\nname: {_quoted(name)}\n\nsources:\n"
    if BASE_SOURCE not in sources:
        yield f"  {BASE_SOURCE}: null # the base's example\n"
    for source_name, source in sources.items():
        yield f"  {_quoted(source_name)}:\n"
        yield from _source_lines(source, 4)
    rows, first = sum(source.rows for source in sources.values()), next(iter(sources.values()))
    batch = min(BASE_BATCH, max(2, 1 << (max(rows, 4) // 2).bit_length() - 1))
    if backbone is not None:
        yield "\n"
        yield BACKBONE.format(path=_quoted(backbone), batch=min(batch, 64))
    elif batch < BASE_BATCH:
        yield "\n"
        yield SMALL.format(batch=batch)
    yield "\nevaluation:\n  sets:\n"
    for set_name, source in sets.items():
        yield f"    {set_name}: # its texts are left out of the training rows\n      source:\n"
        yield from _source_lines(source, 8)
    if not sets:
        yield f"    {HELD_OUT}: # these passages and their queries are left out of the training rows\n"
        yield f"      passages: {_held_out(first.rows)}\n      source:\n"
        yield from _source_lines(first, 8)


def _held_out(rows: int) -> int:
    """Passages to hold out of a file of which so many rows were looked at."""
    return max(2, min(MOST_HELD_OUT, int(rows * HELD_OUT_SHARE))) if rows < SAMPLE_ROWS else MOST_HELD_OUT


def _source_lines(source: NewSource, indent: int) -> Iterable[str]:
    """The entry of a source, with what was guessed as comments."""
    note = " # relative to where the command is run" if any(map(_is_relative, source.files)) else ""
    found = sorted(source.guess.columns.items(), key=lambda item: ROLES.index(item[0]))
    lines = [
        f"format: {source.format}",
        f"paths: [{', '.join(map(_quoted, source.files))}]{note}",
        *(f"# {' '.join(why.split())}" for why in source.guess.why),
        f"columns: {{{', '.join(f'{role}: {_quoted(column)}' for role, column in found)}}}",
    ]
    if source.guess.language is not None:
        lines.append(f"language: {_quoted(source.guess.language)}")
    yield from (f"{' ' * indent}{line}\n" for line in lines)


def _is_relative(file: str) -> bool:
    return "://" not in file and not Path(file).is_absolute()


def _quoted(text: str) -> str:
    """A text as YAML, in quotes where it needs them."""
    return text if re.fullmatch(r"[A-Za-z_][\w./-]*", text) and yaml.safe_load(text) == text else json.dumps(text)
