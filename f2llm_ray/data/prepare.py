"""The prepare stage: from sources to a table of ids and a token store.

Text is read once, cleaned and written where it was read (`rows/`); from there on only ids and places move between
workers. Steps tag rows instead of removing them, so that one count at the end accounts for every row.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from f2llm_ray.base.errors import DataError
from f2llm_ray.base.progress import say
from f2llm_ray.data.account import STEPS, told
from f2llm_ray.data.decontaminate import Screened, make_screen
from f2llm_ray.data.dedup import NEAR
from f2llm_ray.data.flow import parts_of
from f2llm_ray.data.near.find import find_groups
from f2llm_ray.data.read import write_rows
from f2llm_ray.data.reading.base import Piece, SourceBase
from f2llm_ray.data.schema import TextPrompts, query_text, seeded_key, text_key
from f2llm_ray.data.settings import Data, TokenizerSection
from f2llm_ray.data.table import samples, write_table
from f2llm_ray.data.tokens.build import write_prompts, write_store
from f2llm_ray.data.tokens.tokenizer import open_tokenizer, save_tokenizer, train_tokenizer
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import Inputs

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SAMPLES_PER_SOURCE = 3
LAYOUT = "layout.json"
ROWS_VERSION = 3
"""Of what is written of a row: rows that an earlier one wrote are read again."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """All that the data steps depend on."""

    sources: Mapping[str, SourceBase]
    """By name, in the recipe's order: batches are drawn from them in turn."""
    settings: Data
    tokenizer: TokenizerSection
    backbone: str | None
    """Brings the tokenizer where `tokenizer` says none."""
    prompts: TextPrompts
    """What all queries and passages start with."""
    seed: int
    inputs: Inputs
    """Contents of all files that are read, those of a source as "sources.<name>"."""
    screened: Mapping[str, Screened]
    """What evaluation sets, by name, ask and answer: rows that hold it are not trained on."""

    @property
    def instructions(self) -> dict[str, str]:
        """What is said before the queries of each source in stages with instructions."""
        return {name: source.query_instruction for name, source in self.sources.items()}


def prepare(task: Preparation, folder: Folder, known: Folder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs all data steps.

    Parts that this or another run in the root has written are not read again; an interrupted call goes on with
    the files that are there.

    Args:
        task: what to do.
        folder: the stage's folder. It gets `rows/`, `near/`, `table/`, `removed/`, `tokenizer/`, `tokens/` and
            prompts.json.
        known: folder in the root that remembers which parts were read, by their keys.

    Returns:
        Facts for the manifest: `rows` (each step's in, out and dropped by reason), `languages`, `sources`,
        `texts`, `tokens`, `vocabulary`; and the parts of the data card that are counts.

    Raises:
        DataError: a source that cannot be read, or one of which nothing is left.
    """
    settings, shards, started = task.settings, _shards(task, folder), time.monotonic()
    laps: dict[str, dict[str, float]] = {}

    def lap(step: str, rows: int) -> None:
        before = sum(done["seconds"] for done in laps.values())
        laps[step] = {"seconds": round(time.monotonic() - started - before, 2), "rows": rows}

    notes = [note for name, source in task.sources.items() for note in source.notes(name)]
    for note in notes:
        say(f"prepare: {note}")
    screen = make_screen(task.screened, settings.decontaminate)
    parts = parts_of(task.sources, _part_key(task))
    account = write_rows(task.sources, settings, parts=parts, screen=screen, rows=folder / "rows", known=known)
    lap("read", account.rows)
    near = None
    if settings.near_dedup is not None:
        tasks = {name: source.task for name, source in task.sources.items()}
        near = find_groups(settings.near_dedup, tasks, parts, folder, shards)
        lap("near_dedup", near["documents"])
    left = account.left
    write_prompts(folder, task.prompts)
    write_table(
        task.sources,
        settings,
        task.seed,
        parts=parts,
        prompts=task.prompts,
        prepared=folder,
        account=account,
        shards=shards,
    )
    for name in task.sources:
        if not account.kept(name):
            reasons = account.dropped(name) or "it gave no rows"
            raise DataError(f"source {name!r}: no row is left after {', '.join(STEPS)}: {reasons}")
    lap("dedup", left)
    tokenizer = _tokenizer(task, folder)
    lap("tokenizer", account.left)
    store = write_store(
        task.instructions,
        settings.max_tokens,
        shards,
        tokenizer,
        folder,
        folder / "tokens",
        prompts=task.prompts,
    )
    lap("tokens", store.texts)
    if store.cut:
        say(
            f"prepare: {sum(store.cut.values()):,} of {store.texts:,} texts are longer than data.max_tokens "
            f"({settings.max_tokens}) and were cut"
        )
    if near is not None:
        near["samples"] = [
            sample for name in task.sources for sample in samples(folder, name, NEAR, SAMPLES_PER_SOURCE)
        ]
    facts = {
        "texts": store.texts,
        "tokens": store.tokens,
        "cut_texts": store.cut,
        "vocabulary": tokenizer.get_vocab_size(),
    }
    counted = account.card()
    card = {**counted, "near_dedup": near, **facts, "seconds": laps, "notes": notes}
    say(f"prepare: {told(counted['steps'])}")
    kept = {name: {"rows": account.kept(name)} for name in task.sources}
    summary = {"rows": counted["steps"], "languages": account.languages(), "sources": kept}
    return {**summary, **facts, "step_seconds": laps}, card


def _shards(task: Preparation, folder: Folder) -> int:
    """Key ranges of the files between steps: as many as the try began with whose files are there."""
    if not folder.exists(LAYOUT):
        folder.write_json(LAYOUT, {"shards": task.settings.shards})
    return int(folder.read_json(LAYOUT)["shards"])


def _part_key(task: Preparation) -> Any:
    """What gives the key of a part: a hash of all that its rows depend on, and of nothing else."""
    settings = task.settings.identity()
    del settings["validation"], settings["max_tokens"]  # rows are split and cut later
    shared = [
        ROWS_VERSION,
        settings,
        task.screened,
        [entry.digest for entry in task.inputs.get("language_id", ())],
    ]
    shared_key = seeded_key(json.dumps(shared, sort_keys=True)).hex()
    digests = {entry.uri: entry.digest for entries in task.inputs.values() for entry in entries}

    def key(name: str, pieces: tuple[Piece, ...]) -> str:
        source = task.sources[name]
        said = {field: value for field, value in source.identity().items() if field != "cap"}
        content = [[digests[uri] for uri in source.piece_inputs(piece)] for piece in pieces]
        places = [
            {f: v for f, v in piece.items() if not (isinstance(v, str) and v in digests)} for piece in pieces
        ]
        return seeded_key(shared_key, json.dumps([name, said, content, places], sort_keys=True)).hex()

    return key


def _tokenizer(task: Preparation, folder: Folder) -> Tokenizer:
    if task.tokenizer.train_vocab is not None:
        tokenizer = train_tokenizer(_texts(task, folder), task.tokenizer.train_vocab)
    else:
        tokenizer = open_tokenizer(task.tokenizer.path or str(task.backbone))
    with (folder / "tokenizer").writing() as path:
        save_tokenizer(path, tokenizer, task.settings.max_tokens)
    return tokenizer


def _texts(task: Preparation, folder: Folder) -> Iterator[str]:
    """Distinct texts of the corpus, the files in a fixed mixed order so that a sample sees every source."""
    yield from (query_text("", instruction) for instruction in task.instructions.values())
    yield from filter(None, (task.prompts.query, task.prompts.document))
    rows, seen = folder / "rows", set[bytes]()
    for name in sorted(rows.files(".parquet"), key=text_key):
        table = rows.read_table(name, ["drop", "query", "passage"])
        table = table.filter(pc.is_null(table["drop"]))
        for text in [*table["query"].to_pylist(), *table["passage"].to_pylist()]:
            key = text_key(text)[:8]
            if key not in seen:
                seen.add(key)
                yield text
