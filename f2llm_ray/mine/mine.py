"""Mining hard negatives with a model, within each retrieval source, exactly.

plan (number the texts of each source) -> encode (each text once, shards of vectors) -> search (one task per shard
of queries, against all candidates) -> join (one file per source, in the table's row order). Every step leaves
files that are there whole or not at all, and a run that was cut off goes on with those that are missing.

There is no approximate index. 20,000 rows of 384 dims took 3.1 s on one core; faiss's HNSW took 4.8 s to build
and 5.9 s to search, for 95 % of the same passages (`python -m benchmarks.mining --hnsw`). At 80,000 rows, the most
that the paper's sources have, it was 48 s against 34 and 44 s for 90 % (searches scaled from one query shard).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.session import connect
from f2llm_ray.data.flow import Item, each, each_on_actors, start_actors
from f2llm_ray.data.tokens.build import read_prompts
from f2llm_ray.data.tokens.tokenizer import TOKENIZER, differences
from f2llm_ray.engine.names import EngineName
from f2llm_ray.engine.settings import Compute
from f2llm_ray.engine.vector_files import VectorWriter, shard_name
from f2llm_ray.mine.candidates import Candidates, number_texts
from f2llm_ray.mine.join_negatives import join_source
from f2llm_ray.mine.search import FOUND, Layout, search
from f2llm_ray.mine.settings import Mine
from f2llm_ray.model.checkpoint import check_prompts, load_info
from f2llm_ray.run.folder import Folder

COLUMNS = ["row_key", "query_key", "instructed_key", "passage_key", "query_group", "passage_group"]
PLAN, JOINED = "plan.json", "joined.json"


def mine(
    sources: Sequence[str],
    settings: Mine,
    compute: Compute,
    *,
    prepared: Folder,
    model: Folder,
    out: Folder,
    layout: Layout = Layout(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """Mines negatives for every row of some sources, those of the validation split included.

    The model uses the prepared tokenizer. The stage's folder `out` gets `<source>.parquet` (row_key and
    negative_keys in the table's order: the negatives that the source brought, then mined ones), and `plan/`,
    `vectors/` and `found/`.

    Returns:
        Facts for the manifest. `sources`: per source `rows`, `queries`, `candidates`, `texts`, `short_rows` (fewer
        than `count` negatives), `mean_negatives`, `dropped` by reason, and the workers' `encode_seconds` and
        `search_seconds`. `texts` and `tokens` encoded, `texts_per_second`, and the `seconds` of each step. What is
        timed or encoded is of this call, the rest of all the work.

    Raises:
        RunError: a model with another tokenizer or other prompts, or one that gives vectors that are not finite.
    """
    info = load_info(model)
    check_tokenizer(prepared / "tokenizer", model)
    advice = "; mine with a model of this run, or set the recipe's prompts"
    check_prompts(info, read_prompts(prepared), model, advice)
    connect()
    query = "instructed_key" if info.instructions else "query_key"
    seconds, started = {}, time.perf_counter()

    def lap(step: str) -> None:
        nonlocal started
        seconds[step], started = round(time.perf_counter() - started, 2), time.perf_counter()

    plan = partial(_plan, prepared=prepared, out=out, query=query)
    plans = {row["source"]: row for row in each("mine: plan", [{"source": name} for name in sources], plan)}
    lap("plan")
    vectors = [
        {"source": name, "shard": shard}
        for name in sources
        for shard in _missing(out / "vectors" / name, plans[name]["texts"], layout.texts, shard_name)
    ]
    make = partial(
        _EncodeShard, model, prepared / "tokens", out, layout, compute.threads_per_worker, compute.engine
    )
    # No name for the actors: they must be gone when the search starts.
    workers = min(compute.workers, len(vectors))
    encoded = list(each_on_actors("mine: encode", vectors, start_actors(make, workers, **compute.per_worker)))
    lap("encode")
    queries = [
        {"source": name, "shard": shard}
        for name in sources
        for shard in _missing(out / "found" / name, plans[name]["queries"], layout.queries, found_name)
    ]
    look = partial(_search, out=out, settings=settings, layout=layout, threads=compute.threads_per_worker)
    look = partial(look, device="cuda" if compute.gpus_per_worker else "cpu")
    searched = list(each("mine: search", queries, look, **compute.per_worker))
    lap("search")
    join = partial(_join, prepared=prepared, out=out, count=settings.count)
    joined = {row.pop("source"): row for row in each("mine: join", [{"source": name} for name in sources], join)}
    lap("join")
    texts = sum(row["texts"] for row in encoded)
    return {
        "sources": {
            name: {
                **joined[name],
                "encode_seconds": _seconds(encoded, name),
                "search_seconds": _seconds(searched, name),
            }
            for name in sources
        },
        "texts": texts,
        "tokens": sum(row["tokens"] for row in encoded),
        "seconds": seconds,
        "texts_per_second": round(texts / max(seconds["encode"], 1e-9), 1) if texts else None,
    }


def check_tokenizer(prepared: Folder, model: Folder) -> None:
    """Refuses a model whose tokens are not the prepared ones.

    Raises:
        RunError: its tokenizer.json says something else.
    """
    other = differences(prepared, model)
    if other:
        raise RunError(
            f"{model.uri}/{TOKENIZER}: not the tokenizer of the prepared data in {prepared.uri}; they differ in "
            f"{', '.join(other)}. Mine with a model of this run, or prepare with this model's tokenizer"
        )


def _seconds(results: list[Item], source: str) -> float:
    return round(sum(row["seconds"] for row in results if row["source"] == source), 2)


def found_name(shard: int) -> str:
    """File of what was found for a shard of queries."""
    return f"{shard:06d}.parquet"


def _missing(folder: Folder, items: int, per_shard: int, name: Callable[[int], str]) -> list[int]:
    there = set(folder.files())
    return [shard for shard in range(-(-items // per_shard)) if name(shard) not in there]


def _plan(item: Item, *, prepared: Folder, out: Folder, query: str) -> Item:
    folder = out / "plan" / item["source"]
    if not folder.exists(PLAN):
        table = (prepared / "table").read_table(f"{item['source']}.parquet", [*COLUMNS])
        found = number_texts(table, query)
        found.save(folder)
        counts = {"texts": len(found.number), "queries": len(found.queries), "candidates": len(found.candidates)}
        folder.write_json(PLAN, {**item, "rows": len(table), **counts})
    return dict(folder.read_json(PLAN))


class _EncodeShard:
    """Writes the vectors of shards of a source's texts; made once per actor."""

    def __init__(
        self, model: Folder, tokens: Folder, out: Folder, layout: Layout, threads: int, engine: EngineName
    ) -> None:
        self.encoder = VectorWriter(model, tokens, threads, engine=engine)
        self.out, self.layout = out, layout

    def __call__(self, item: Item) -> Item:
        name, shard, size = item["source"], item["shard"], self.layout.texts
        keys = Candidates.load(self.out / "plan" / name).texts[:, shard * size : (shard + 1) * size].T
        folder = self.out / "vectors" / name
        return {**item, **self.encoder.write(np.ascontiguousarray(keys), folder, shard_name(shard))}


def _search(item: Item, *, out: Folder, settings: Mine, layout: Layout, threads: int, device: str) -> Item:
    started = time.perf_counter()
    torch.set_num_threads(threads)
    name, shard = item["source"], item["shard"]
    found = Candidates.load(out / "plan" / name)
    rows, dropped = search(found, out / "vectors" / name, shard, settings, layout=layout, device=device)
    # The counts travel in the shard, so that the facts can be made of shards from several runs.
    schema = FOUND.with_metadata({"dropped": json.dumps(dropped)})
    (out / "found" / name).write_table(found_name(shard), [rows], schema)
    return {**item, "seconds": time.perf_counter() - started}


def _join(item: Item, *, prepared: Folder, out: Folder, count: int) -> Item:
    name = item["source"]
    folder = out / "plan" / name
    if not folder.exists(JOINED):
        folder.write_json(JOINED, {**folder.read_json(PLAN), **join_source(name, prepared, out, count)})
    return dict(folder.read_json(JOINED))
