"""Building the batch tables of a training from the prepared rows: one task for each epoch of each source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.data.batches.table import by_length, epoch_rows, mix, row_rates, write_source
from f2llm_ray.data.language import UNKNOWN
from f2llm_ray.data.ragged import Ints
from f2llm_ray.data.schema import SCORES, SourceFacts, Task, key_numbers, rng, with_column
from f2llm_ray.data.tokens.store import TokenStore
from f2llm_ray.run.folder import Folder


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How the rows of a training's sources become global batches."""

    epochs: int
    max_batches: int | None
    """Batches of the order, over as many epochs as that takes; those of `epochs` when None."""
    held_out_batches: int
    """Batches of held-out rows, at most."""
    global_batch: int
    """Rows of a batch."""
    negatives: Mapping[Task, int]
    """Negatives drawn for each row and epoch; none for a task that is not named."""
    language_temperature: float
    length_window: int
    """Batches whose rows are sorted by length before they are cut; 1 leaves lengths mixed."""
    instructions: bool
    """Whether queries come with the instruction of their source."""


def build_batches(
    plan: BatchPlan,
    sources: Mapping[str, SourceFacts],
    seed: str,
    *,
    prepared: Folder,
    mined: Folder | None,
    out: Folder,
) -> int:
    """Writes the batch tables of a training: `train/` for all epochs and `validation/` for the held-out rows.

    Args:
        plan: how many batches there are, and of which rows.
        sources: the sources by name, in the order that entries of the tables number them.
        seed: seed of the run and the training.
        prepared: folder of the prepare stage.
        mined: folder of the mining stage, whose negatives replace the prepared ones.
        out: folder that gets both tables.

    Returns:
        Epochs of `train/`, the last of which may be cut.
    """
    import ray.data

    write = partial(_write_epoch, plan=plan, sources=sources, seed=seed, prepared=prepared, mined=mined, out=out)
    counts: dict[tuple[str, int, str], int] = {}

    def write_epochs(split: str, epochs: range) -> None:
        work = [{"source": source, "epoch": epoch, "split": split} for epoch in epochs for source in sources]
        for row in ray.data.from_items(work, override_num_blocks=len(work)).map(write).take_all():
            counts[row["split"], row["epoch"], row["source"]] = row["batches"]

    def batches(split: str, epochs: int) -> list[list[int]]:
        return [[counts[split, epoch, source] for source in sources] for epoch in range(epochs)]

    epochs = plan.epochs
    write_epochs("train", range(epochs))
    while last := sum(batches("train", epochs)[-1]):
        missing = (plan.max_batches or 0) - sum(map(sum, batches("train", epochs)))
        if missing <= 0:
            break
        more = -(-missing // last)  # epochs may differ by a batch, so that it may take another round
        write_epochs("train", range(epochs, epochs + more))
        epochs += more
    write_epochs("validation", range(1))
    for split, count, most in (("train", epochs, plan.max_batches), ("validation", 1, plan.held_out_batches)):
        with (out / split).writing() as folder:
            np.save(folder / "order.npy", mix(batches(split, count), seed=seed, max_steps=most))
    return epochs


def _write_epoch(
    work: dict[str, Any],
    *,
    plan: BatchPlan,
    sources: Mapping[str, SourceFacts],
    seed: str,
    prepared: Folder,
    mined: Folder | None,
    out: Folder,
) -> dict[str, Any]:
    source, epoch, split = work["source"], work["epoch"], work["split"]
    facts = sources[source]
    query = "instructed_key" if plan.instructions else "query_key"
    names = {query: "query", "passage_key": "passage", "negative_keys": "negatives"}
    columns = [*names, "query_group", "passage_group", "language", "validation"]
    columns += [field.name for field in SCORES if facts.scored]
    file = f"{source}.parquet"
    rows = (prepared / "table").read_table(file, columns)
    if mined is not None and mined.exists(file):  # its rows are in the table's order
        negatives = mined.read_table(file, ["negative_keys"])["negative_keys"]
        if facts.scored:
            rows = with_column(rows, "negative_scores", scores_among(rows, negatives))
        rows = rows.set_column(columns.index("negative_keys"), "negative_keys", negatives)
    rows = rows.filter(pc.equal(rows["validation"], split == "validation")).rename_columns(
        [names.get(column, column) for column in columns]
    )
    if not len(rows):  # a small source may have no held-out rows, and with data.validation 0 none has
        return {**work, "batches": 0}
    seed = f"{seed}/{split}/{epoch}"
    languages = rows["language"].combine_chunks().fill_null(UNKNOWN).dictionary_encode().indices
    rates = np.ones(len(rows))
    if split == "train":
        rates = row_rates(languages.to_numpy().astype(np.int64), facts.weight, plan.language_temperature)
    order = epoch_rows(rates, rng(seed, source, "order"))
    if plan.length_window > 1:
        with (prepared / "tokens").as_local() as store:
            order = by_length(order, _lengths(rows, TokenStore(store)), plan.length_window * plan.global_batch)
    with (out / split / f"epoch-{epoch:03d}").writing() as folder:
        batches = write_source(
            folder / f"{source}.arrow",
            rows,
            order,
            source=source,
            task=facts.task,
            negatives=plan.negatives.get(facts.task, 0),
            size=plan.global_batch,
            seed=seed,
        )
    return {**work, "batches": batches}


def scores_among(rows: pa.Table, negatives: pa.ChunkedArray) -> pa.Array:
    """The scores of other negatives than those that rows brought: those of what they brought, null of the rest.

    Args:
        rows: columns negative_keys and negative_scores.
        negatives: a list of keys for each row.
    """
    columns = (rows["negative_keys"], rows["negative_scores"], negatives)
    known = (
        (dict(zip(keys, scores, strict=True)), wanted)
        for keys, scores, wanted in zip(*(column.to_pylist() for column in columns), strict=True)
    )
    found = [[score_of.get(key) for key in wanted] for score_of, wanted in known]
    return pa.array(found, rows["negative_scores"].type)


def _lengths(rows: pa.Table, store: TokenStore) -> Ints:
    """Tokens of query and passage of each row."""
    query, passage = (store.lengths(key_numbers(rows[side])) for side in ("query", "passage"))
    return query + passage
