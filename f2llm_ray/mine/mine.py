"""Mining hard negatives with a model, within each retrieval source, exactly.

plan (number the texts of each source) -> encode (each text once, shards of vectors) -> search (one task per shard
of queries, against all candidates) -> rescore (where another model scores what was found) -> join (one file per
source, in the table's row order). Every step leaves files that are there whole or not at all, and a run that was
cut off goes on with those that are missing.

There is no approximate index. 20,000 rows of 384 dims took 3.1 s on one core; faiss's HNSW took 4.8 s to build
and 5.9 s to search, for 95 % of the same passages (`python -m benchmarks.mining --hnsw`). At 80,000 rows, the most
that the paper's sources have, it was 48 s against 34 and 44 s for 90 % (searches scaled from one query shard).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.session import connect
from f2llm_ray.data.flow import Item, each, each_on_actors, start_actors
from f2llm_ray.data.schema import TextPrompts
from f2llm_ray.data.tokens.build import INSTRUCTED, QUERY, read_prompts, write_own_store, write_store
from f2llm_ray.data.tokens.tokenizer import TOKENIZER, differences
from f2llm_ray.engine.cross_encoder import EMBEDDING
from f2llm_ray.engine.names import EngineName
from f2llm_ray.engine.settings import Compute
from f2llm_ray.engine.vector_files import VectorWriter, shard_name
from f2llm_ray.mine.candidates import Candidates, number_texts
from f2llm_ray.mine.join_negatives import join_source
from f2llm_ray.mine.rescore import NEAR, RescorePart, near_table
from f2llm_ray.mine.scorers import SIDES, Rescorer, SideEncoder, look_at, vectors_of_side
from f2llm_ray.mine.search import Layout, choose_of_rows, find_near, found_name, write_found
from f2llm_ray.mine.settings import Mine
from f2llm_ray.model.checkpoint import check_prompts, load_info
from f2llm_ray.run.folder import Folder

COLUMNS = ["row_key", "query_key", "instructed_key", "passage_key", "query_group", "passage_group"]
PLAN, JOINED = "plan.json", "joined.json"
COUNTED = {"query": "queries", "passage": "passages"}
"""What the plan calls the number of texts of a side."""


def mine(
    sources: Sequence[str],
    settings: Mine,
    compute: Compute,
    *,
    prepared: Folder,
    model: Folder,
    rescorer: Folder | str | None = None,
    instructions: Mapping[str, str] = MappingProxyType({}),
    out: Folder,
    layout: Layout = Layout(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """Mines negatives for every row of some sources, those of the validation split included.

    The model uses the prepared tokenizer. The stage's folder `out` gets `<source>.parquet` (row_key and
    negative_keys in the table's order: the negatives that the source brought, then mined ones), and `plan/`,
    `vectors/` and `found/`; with a rescorer `near/` and `texts/` too, and `rescorer/` where that embeds.

    Args:
        sources: names of the sources.
        settings: of mining.
        compute: what it may use of the cluster.
        prepared: folder of the prepare stage.
        model: model folder.
        rescorer: the model of `settings.rescore`, its folder or its name on the hub.
        instructions: the instruction of each source, for a rescorer that was trained with instructions.
        out: the stage's folder.
        layout: how the work is cut.

    Returns:
        Facts for the manifest. `sources`: per source `rows`, `queries`, `candidates`, `texts`, `short_rows` (fewer
        than `count` negatives), `mean_negatives`, `dropped` by reason, and the workers' `encode_seconds`,
        `search_seconds` and `rescore_seconds`. `rescored_by`, the kind of the rescorer. `texts` and `tokens`
        that the mining model encoded, `texts_per_second`, and the `seconds` of each step. What is timed or encoded
        is of this call, the rest of all the work.

    Raises:
        RunError: a model with another tokenizer or other prompts, or one that gives vectors that are not finite; a
            rescorer that is none (`scorers.look_at`).
    """
    info = load_info(model)
    check_tokenizer(prepared / "tokenizer", model)
    advice = "; mine with a model of this run, or set the recipe's prompts"
    check_prompts(info, read_prompts(prepared), model, advice)
    again = None if rescorer is None else look_at(rescorer)
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
    place = "found" if again is None else "near"
    queries = [
        {"source": name, "shard": shard}
        for name in sources
        for shard in _missing(out / place / name, plans[name]["queries"], layout.queries, found_name)
    ]
    look = partial(_search, out=out, settings=settings, layout=layout, threads=compute.threads_per_worker)
    look = partial(look, device="cuda" if compute.gpus_per_worker else "cpu")
    searched = list(each("mine: search", queries, look, **compute.per_worker))
    lap("search")
    rescored: list[Item] = []
    if again is not None:
        rescored = _rescore(
            again, plans, settings, compute, instructions, query=query, prepared=prepared, out=out, layout=layout
        )
        lap("rescore")
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
                **({} if again is None else {"rescore_seconds": _seconds(rescored, name)}),
            }
            for name in sources
        },
        **({} if again is None else {"rescored_by": again.kind}),
        "texts": texts,
        "tokens": sum(row["tokens"] for row in encoded),
        "seconds": seconds,
        "texts_per_second": round(texts / max(seconds["encode"], 1e-9), 1) if texts else None,
    }


def _rescore(
    rescorer: Rescorer,
    plans: Mapping[str, Item],
    settings: Mine,
    compute: Compute,
    instructions: Mapping[str, str],
    *,
    query: str,
    prepared: Folder,
    out: Folder,
    layout: Layout,
) -> list[Item]:
    """Scores what was found again, and chooses by these scores; gives what came of each piece of work."""
    role = INSTRUCTED if query == "instructed_key" else QUERY
    # The texts alone: a rescorer has prompts of its own, and an instruction is put before a query when it is read.
    write = partial(
        write_store, dict.fromkeys(plans), 0, 1, None, prepared, prompts=TextPrompts(), queries=(role,)
    )
    store = write_own_store(write, rescorer.name, prepared, out / "texts")
    done: list[Item] = []
    if rescorer.kind == EMBEDDING:
        sides = [
            {"source": name, "side": side, "shard": shard}
            for name in plans
            for side in SIDES
            for shard in _missing(
                vectors_of_side(out, name, side), plans[name][COUNTED[side]], layout.texts, shard_name
            )
        ]
        encode = partial(SideEncoder, rescorer.model, store, out, layout, instructions)
        workers = min(compute.workers, len(sides))
        done += each_on_actors("mine: encode again", sides, start_actors(encode, workers, **compute.per_worker))
    parts = [
        {"source": name, "shard": part}
        for name in plans
        for part in _missing(out / "found" / name, plans[name]["queries"], layout.rescored, found_name)
    ]
    make = partial(RescorePart, rescorer, store, out, layout, settings, compute.threads_per_worker)
    workers = min(compute.workers, len(parts))
    done += each_on_actors("mine: rescore", parts, start_actors(make, workers, **compute.per_worker))
    return done


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
        counts["passages"] = int((found.number >= 0).sum())
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
    near = find_near(found, out / "vectors" / name, shard, settings.top_k, layout=layout, device=device)
    if settings.rescore is None:
        write_found(out / "found" / name, shard, *choose_of_rows(found, shard * layout.queries, near, settings))
    else:
        (out / "near" / name).write_table(found_name(shard), [near_table(near)], NEAR)
    return {**item, "seconds": time.perf_counter() - started}


def _join(item: Item, *, prepared: Folder, out: Folder, count: int) -> Item:
    name = item["source"]
    folder = out / "plan" / name
    if not folder.exists(JOINED):
        folder.write_json(JOINED, {**folder.read_json(PLAN), **join_source(name, prepared, out, count)})
    return dict(folder.read_json(JOINED))
