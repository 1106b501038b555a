"""The prepare stage: from the recipe's sources to a table of ids, a token store and evaluation sets.

Text is read once, cleaned and written where it was read (`rows/`); from there on only ids and places move between
workers. Steps tag rows instead of removing them, so that one count at the end accounts for every row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from f2llm_ray.data.account import STEPS
from f2llm_ray.data.clean import normalize
from f2llm_ray.data.flow import parts_of
from f2llm_ray.data.read import read_pairs, write_rows
from f2llm_ray.data.schema import query_text, text_key
from f2llm_ray.data.store import write_store
from f2llm_ray.data.table import write_table
from f2llm_ray.data.tokenizer import load_tokenizer, train_tokenizer
from f2llm_ray.errors import DataError
from f2llm_ray.evaluate.sets import RetrievalSet, from_pairs, read_beir, write_set
from f2llm_ray.model.checkpoint import save_tokenizer
from f2llm_ray.recipe import FolderSet, Recipe
from f2llm_ray.run import Folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def prepare(recipe: Recipe, folder: Folder) -> dict[str, Any]:
    """Runs all data steps; parts that an earlier try has written are not read again.

    Args:
        recipe: the run's recipe.
        folder: the stage's folder. It gets `sets/`, `rows/`, `table/`, `tokenizer/` and `tokens/`.

    Returns:
        What the manifest says: `rows` (each step's in, out and dropped by reason), `languages`, `sources`,
        `texts`, `tokens`, `vocabulary`.

    Raises:
        DataError: a source that cannot be read, or one of which nothing is left.
    """
    sets = [_evaluation_set(recipe, name) for name in recipe.evaluation.sets]
    for found in sets:
        write_set(folder / "sets" / found.name, found)
    parts = parts_of(recipe.sources)
    counts = write_rows(recipe, parts, {found.name: _queries_of(found) for found in sets}, folder / "rows")
    for row in write_table(recipe, parts, folder / "rows", folder / "table"):
        counts.drop(row)
    for name in recipe.sources:
        if not counts.kept(name):
            reasons = counts.dropped(name) or "it gave no rows"
            raise DataError(f"source {name!r}: no row is left after {', '.join(STEPS)}: {reasons}")
    tokenizer = _tokenizer(recipe, folder)
    texts, tokens = write_store(recipe, parts, tokenizer, folder)
    return {
        "rows": counts.steps(),
        "languages": counts.languages(),
        "sources": {
            name: {"task": source.task, "licence": source.licence, "rows": counts.kept(name)}
            for name, source in recipe.sources.items()
        },
        "texts": texts,
        "tokens": tokens,
        "vocabulary": tokenizer.get_vocab_size(),
    }


def _evaluation_set(recipe: Recipe, name: str) -> RetrievalSet:
    setting = recipe.evaluation.sets[name]
    if isinstance(setting, FolderSet):
        return read_beir(
            setting.folder, name=name, instruction=setting.instruction, max_queries=setting.max_queries
        )
    pairs = read_pairs(name, setting.source, recipe.data)
    return from_pairs(
        pairs, name=name, instruction=setting.source.query_instruction, max_queries=setting.max_queries
    )


def _queries_of(found: RetrievalSet) -> frozenset[bytes]:
    return frozenset(text_key(normalize(text)) for text in found.query_texts)


def _tokenizer(recipe: Recipe, folder: Folder) -> Tokenizer:
    settings = recipe.tokenizer
    if settings.train_vocab is not None:
        tokenizer = train_tokenizer(_texts(recipe, folder), settings.train_vocab)
    else:
        tokenizer = load_tokenizer(settings.path or str(recipe.backbone.path))
    with (folder / "tokenizer").writing() as path:
        save_tokenizer(path, tokenizer, recipe.data.max_tokens)
    return tokenizer


def _texts(recipe: Recipe, folder: Folder) -> Iterator[str]:
    """Distinct texts of the corpus, the files in a fixed mixed order so that a sample sees every source."""
    yield from (query_text("", source.query_instruction) for source in recipe.sources.values())
    rows, seen = folder / "rows", set[bytes]()
    for name in sorted(rows.files(".parquet"), key=text_key):
        table = rows.read_table(name, ["drop", "query", "passage"])
        table = table.filter(pc.is_null(table["drop"]))
        for text in [*table["query"].to_pylist(), *table["passage"].to_pylist()]:
            key = text_key(text)[:8]
            if key not in seen:
                seen.add(key)
                yield text
