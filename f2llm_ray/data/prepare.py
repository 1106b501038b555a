"""The prepare stage: from the recipe's sources to a table of ids, a token store and evaluation sets.

Text is read once, cleaned and written where it was read (`rows/`); from there on only ids and places move between
workers. Steps tag rows instead of removing them, so that one count at the end accounts for every row.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from f2llm_ray.base.errors import DataError
from f2llm_ray.data.account import STEPS
from f2llm_ray.data.decontaminate import make_screen
from f2llm_ray.data.dedup import NEAR
from f2llm_ray.data.flow import parts_of
from f2llm_ray.data.near.find import find_groups
from f2llm_ray.data.read import read_pairs, write_rows
from f2llm_ray.data.schema import query_text, text_key
from f2llm_ray.data.table import samples, write_table
from f2llm_ray.data.tokens.build import write_store
from f2llm_ray.data.tokens.tokenizer import open_tokenizer, save_tokenizer, train_tokenizer
from f2llm_ray.evaluate.settings import SourceSet
from f2llm_ray.evaluate.tasks.bitext import bitext_of_pairs
from f2llm_ray.evaluate.tasks.kinds import task_of
from f2llm_ray.evaluate.tasks.retrieval_set import from_pairs
from f2llm_ray.evaluate.tasks.task import Task
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.report.data_card import write_card
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SAMPLES_PER_SOURCE = 3


def prepare(recipe: Recipe, folder: Folder) -> dict[str, Any]:
    """Runs all data steps; parts that an earlier try has written are not read again.

    Args:
        recipe: the run's recipe.
        folder: the stage's folder. It gets `sets/`, `rows/`, `near/`, `table/`, `removed/`, `tokenizer/`,
            `tokens/`, and the data card as card.json and card.html.

    Returns:
        What the manifest says: `rows` (each step's in, out and dropped by reason), `languages`, `sources`,
        `texts`, `tokens`, `vocabulary`.

    Raises:
        DataError: a source that cannot be read, or one of which nothing is left.
    """
    clock = _Clock()
    sets = [_evaluation_set(recipe, name) for name in recipe.evaluation.sets]
    for found in sets:
        found.write(folder / "sets" / found.name)
    clock.lap("sets", sum(len(texts) for found in sets for texts in found.screened()))
    parts = parts_of(recipe.sources)
    account = write_rows(recipe, parts, make_screen(sets, recipe.data.decontaminate), folder / "rows")
    clock.lap("read", account.rows)
    near = None
    if recipe.data.near_dedup is not None:
        near = find_groups(recipe, parts, folder)
        clock.lap("near_dedup", near["documents"])
    left = account.left
    write_table(recipe, parts, folder, account)
    for name in recipe.sources:
        if not account.kept(name):
            reasons = account.dropped(name) or "it gave no rows"
            raise DataError(f"source {name!r}: no row is left after {', '.join(STEPS)}: {reasons}")
    clock.lap("dedup", left)
    tokenizer = _tokenizer(recipe, folder)
    clock.lap("tokenizer", account.left)
    texts, tokens = write_store(recipe, tokenizer, folder, folder / "tokens")
    clock.lap("tokens", texts)
    if near is not None:
        near["samples"] = [
            sample for name in recipe.sources for sample in samples(folder, parts, name, NEAR, SAMPLES_PER_SOURCE)
        ]
    sources = {
        name: {"task": source.task, "licence": source.licence, "instruction": source.query_instruction}
        for name, source in recipe.sources.items()
    }
    facts = {"texts": texts, "tokens": tokens, "vocabulary": tokenizer.get_vocab_size()}
    counted = account.card()
    write_card(
        folder,
        {
            "name": recipe.name,
            "sources": sources,
            **counted,
            "near_dedup": near,
            **facts,
            "seconds": clock.laps,
        },
    )
    return {
        "rows": counted["steps"],
        "languages": account.languages(),
        "sources": {name: {**source, "rows": account.kept(name)} for name, source in sources.items()},
        **facts,
        "step_seconds": clock.laps,
    }


class _Clock:
    """How long each step took, and the rows or texts that it worked on."""

    def __init__(self) -> None:
        self.laps: dict[str, dict[str, float]] = {}
        self._last = time.monotonic()

    def lap(self, step: str, rows: int) -> None:
        """Ends a step."""
        now = time.monotonic()
        self.laps[step] = {"seconds": round(now - self._last, 2), "rows": rows}
        self._last = now


def _evaluation_set(recipe: Recipe, name: str) -> Task:
    setting = recipe.evaluation.sets[name]
    if not isinstance(setting, SourceSet):
        return task_of(name, setting)
    pairs = read_pairs(name, setting.source, recipe.data)
    make = bitext_of_pairs if setting.kind == "bitext" else from_pairs
    return make(pairs, name=name, instruction=setting.source.query_instruction, max_queries=setting.max_queries)


def _tokenizer(recipe: Recipe, folder: Folder) -> Tokenizer:
    settings = recipe.tokenizer
    if settings.train_vocab is not None:
        tokenizer = train_tokenizer(_texts(recipe, folder), settings.train_vocab)
    else:
        tokenizer = open_tokenizer(settings.path or str(recipe.backbone.path))
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
