"""Near dedup: groups of texts that say nearly the same, by MinHash-LSH on Ray Data.

Each part's texts become band keys; texts that share one meet in a shuffle of (band key, text key), where the
smallest key of a bucket is tied to the others. Ties may be checked by the exact Jaccard of their shingles. What is
connected is a group, and its smallest key stands for it. Text never moves: a checked text's shingles are read
where its row lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.data.components import EDGE, spread, stars
from f2llm_ray.data.flow import Part, Tables, map_groups, map_parts
from f2llm_ray.data.groups import members_file, write_members
from f2llm_ray.data.keys import find_keys, shard_of
from f2llm_ray.data.minhash import PRESETS, band_keys, signatures
from f2llm_ray.data.ragged import list_array
from f2llm_ray.data.schema import KEY, key_numbers
from f2llm_ray.data.sets import Sets, jaccards, write_sets
from f2llm_ray.data.settings import NearDedup
from f2llm_ray.data.shingles import shingle
from f2llm_ray.progress import Progress, say
from f2llm_ray.recipe import Recipe
from f2llm_ray.run import Folder

if TYPE_CHECKING:
    import ray.data

# Edges that one process connects; 5 million take about 1 GB while their ends are numbered.
EDGES_IN_MEMORY = 5_000_000
# Pairs checked at once: their shingles take some 10 MB.
CHECKED_AT_ONCE = 10_000
FACTS = "near.json"


def find_groups(recipe: Recipe, parts: list[Part], prepared: Folder) -> dict[str, Any]:
    """Writes `near/`: the groups of all texts of the rows that are still in.

    Labels of classification sources take no part: two labels that read alike are still two.

    Args:
        recipe: the run's recipe, with `data.near_dedup`.
        parts: the parts of its sources, whose files hold the texts.
        prepared: folder with `rows/`.

    Returns:
        What the data card says of it: settings, curve, and the numbers of documents, pairs and groups.
    """
    settings = recipe.data.near_dedup
    assert settings is not None  # noqa: S101 - called because the recipe has it
    near, shards = prepared / "near", recipe.data.shards
    if near.exists(FACTS):
        return dict(near.read_json(FACTS))
    near.clear()
    lsh = PRESETS[settings.preset]
    say(f"prepare: near-duplicates, {curve_line(settings)}")
    documents = partial(_documents, recipe=recipe, rows=prepared / "rows")
    bands = map_parts(parts, partial(_bands, documents=documents, settings=settings, shards=shards))
    buckets = map_groups(bands, "shard", partial(_tie, out=near / "pairs"))
    facts, progress = [], Progress("prepare: near-duplicates", shards, "shards")
    for row in buckets.iter_rows():
        facts.append(row)
        progress.update(len(facts), f"{sum(fact['pairs'] for fact in facts):,} pairs")
    pairs = _edges(near / "pairs")
    if settings.min_jaccard is not None:
        _write_sets(parts, documents, pairs, settings, shards, near)
    settle = partial(_settle, near=near, shards=shards, threshold=settings.min_jaccard)
    settled = map_groups(_keyed(pairs, "b", shards), "shard", settle).take_all()
    candidates, accepted = (sum(row[name] for row in settled) for name in ("candidates", "accepted"))
    found = {
        **settings.model_dump(mode="json"),
        "bands": lsh.bands,
        "rows": lsh.rows,
        "curve": [[j / 20, round(lsh.probability(j / 20), 4)] for j in range(21)],
        "documents": sum(fact["entries"] for fact in facts) // lsh.bands,
        "candidates": candidates,
        "accepted": accepted,
        **_connect(accepted, shards, near),
    }
    near.write_json(FACTS, found)
    return found


def curve_line(settings: NearDedup) -> str:
    """The S-curve of a preset in words."""
    lsh = PRESETS[settings.preset]
    chances = ", ".join(f"{lsh.probability(j):.0%} at {j}" for j in (0.5, 0.6, 0.7, 0.8, 0.9))
    return f"{lsh.bands} bands of {lsh.rows}: pairs found by their Jaccard, {chances}"


def _documents(part: Part, *, recipe: Recipe, rows: Folder) -> Iterator[tuple[pa.Array, list[str]]]:
    """The distinct texts of a part's rows that are still in, with their keys, some thousands of rows at a time."""
    sides = {"query": "query_key"}
    if recipe.sources[part.source].task != "classification":
        sides |= {"passage": "passage_key", "negatives": "negative_keys"}
    seen: set[bytes] = set()
    for table in rows.read_batches(part.file, [*sides, *sides.values(), "drop"]):
        kept = table.filter(pc.is_null(table["drop"]))
        texts: dict[bytes, str] = {}
        for text_column, key_column in sides.items():
            found, keys = kept[text_column], kept[key_column]
            if text_column == "negatives":
                found, keys = pc.list_flatten(found), pc.list_flatten(keys)
            texts.update(zip(keys.to_pylist(), found.to_pylist(), strict=True))
        for key in texts.keys() & seen:
            del texts[key]
        seen.update(texts)
        if texts:
            yield pa.array(list(texts), KEY), list(texts.values())


# From texts to pairs.


def _bands(part: Part, *, documents: Any, settings: NearDedup, shards: int) -> Tables:
    lsh = PRESETS[settings.preset]
    for keys, texts in documents(part):
        signature = signatures(shingle(texts, settings.shingle), lsh.bands * lsh.rows)
        bands = band_keys(signature, lsh).ravel()
        owner = np.repeat(np.arange(len(texts)), lsh.bands)
        shard = ((bands >> np.uint64(32)) * np.uint64(shards) >> np.uint64(32)).astype(np.int64)
        yield pa.table({"band": bands, "key": keys.take(pa.array(owner)), "shard": shard})


def _tie(bands: pa.Table, *, out: Folder) -> pa.Table:
    """Ties the smallest key of each bucket to the others, and writes the pairs of a shard of buckets."""
    shard = bands["shard"][0].as_py()
    bands = bands.select(["band", "key"]).group_by(["band", "key"]).aggregate([])
    bands = bands.sort_by([("band", "ascending"), ("key", "ascending")]).combine_chunks()
    band, key = bands["band"].to_numpy(), bands["key"].combine_chunks()
    first = np.append(True, band[1:] != band[:-1])
    head = np.flatnonzero(first)[np.cumsum(first) - 1]
    others = np.flatnonzero(~first)
    pairs = pa.table({"a": key.take(pa.array(head[others])), "b": key.take(pa.array(others))}, EDGE)
    pairs = pairs.group_by(["a", "b"]).aggregate([])
    out.write_table(f"{shard:04d}.parquet", [pairs], EDGE)
    return pa.table({"entries": [len(bands)], "pairs": [len(pairs)]})


def _edges(folder: Folder) -> ray.data.Dataset:
    import ray.data

    names = folder.files(".parquet")
    files = ray.data.from_items([{"file": name} for name in names], override_num_blocks=max(len(names), 1))
    return files.map_batches(partial(_read_edges, folder=folder), batch_size=1, batch_format="pyarrow")


def _read_edges(files: pa.Table, *, folder: Folder) -> pa.Table:
    (name,) = files["file"].to_pylist()
    return folder.read_table(name)


def _keyed(table: ray.data.Dataset, column: str, shards: int) -> ray.data.Dataset:
    """Adds the shard of a column's keys, by which equal ones meet."""
    return table.map_batches(
        partial(_with_shard, column=column, shards=shards), batch_format="pyarrow", batch_size=None
    )


def _with_shard(table: pa.Table, *, column: str, shards: int) -> pa.Table:
    if not table.num_columns:  # a block that had no rows
        return table
    return table.append_column("shard", pa.array(shard_of(key_numbers(table[column]), shards)))


# Checking pairs.


def _write_sets(
    parts: list[Part], documents: Any, pairs: ray.data.Dataset, settings: NearDedup, shards: int, near: Folder
) -> None:
    """Writes the shingles of every text that stands in a pair."""
    ends = pairs.map_batches(partial(_ends, shards=shards), batch_format="pyarrow", batch_size=None)
    map_groups(ends, "shard", partial(_write_wanted, out=near / "wanted")).materialize()
    sets = map_parts(parts, partial(_sets, documents=documents, settings=settings, shards=shards, near=near))
    map_groups(sets, "shard", partial(_write_shard_of_sets, out=near / "sets")).materialize()


def _ends(pairs: pa.Table, *, shards: int) -> pa.Table:
    ends = pa.concat_arrays([*pairs["a"].chunks, *pairs["b"].chunks]).unique()
    return _with_shard(pa.table({"key": ends}), column="key", shards=shards)


def _write_wanted(ends: pa.Table, *, out: Folder) -> pa.Table:
    shard = ends["shard"][0].as_py()
    keys = ends["key"].unique().sort()
    with out.writing() as folder:
        np.save(folder / f"{shard:04d}.npy", np.ascontiguousarray(key_numbers(keys).T))
    return pa.table({"texts": [len(keys)]})


def _sets(part: Part, *, documents: Any, settings: NearDedup, shards: int, near: Folder) -> Tables:
    with (near / "wanted").as_local() as folder:
        wanted = {int(path.stem): np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
        for keys, texts in documents(part):
            shard = shard_of(key_numbers(keys), shards)
            chosen = np.zeros(len(texts), bool)
            for number in np.intersect1d(shard, list(wanted)):
                rows = np.flatnonzero(shard == number)
                chosen[rows] = find_keys(wanted[number], key_numbers(keys)[rows]) >= 0
            rows = np.flatnonzero(chosen)
            if len(rows):
                hashes, lengths = shingle([texts[row] for row in rows], settings.shingle).distinct()
                sets = list_array(pa.array(hashes), lengths)
                yield pa.table({"key": keys.take(pa.array(rows)), "hashes": sets, "shard": shard[rows]})


def _write_shard_of_sets(sets: pa.Table, *, out: Folder) -> pa.Table:
    shard = sets["shard"][0].as_py()
    with out.writing() as folder:
        write_sets(folder, shard, sets)
    return pa.table({"texts": [len(sets)]})


def _settle(pairs: pa.Table, *, near: Folder, shards: int, threshold: float | None) -> pa.Table:
    """Writes the distinct pairs of a shard, those whose texts have at least this Jaccard where one is given."""
    shard = pairs["shard"][0].as_py()
    pairs = pairs.group_by(["a", "b"]).aggregate([]).sort_by([("a", "ascending"), ("b", "ascending")])
    edges = pairs
    if threshold is not None:
        with (near / "sets").as_local() as folder:
            sets = Sets(folder, shards)
            kept = [
                jaccards(*(sets.of(key_numbers(some[end])) for end in ("a", "b"))) >= threshold
                for some in pairs.to_batches(max_chunksize=CHECKED_AT_ONCE)
            ]
        edges = pairs.filter(pa.array(np.concatenate(kept)))
    (near / "edges").write_table(f"{shard:04d}.parquet", [edges], EDGE)
    return pa.table({"candidates": [len(pairs)], "accepted": [len(edges)]})


# From pairs to groups.


def _connect(accepted: int, shards: int, near: Folder) -> dict[str, Any]:
    """Writes the groups that the accepted pairs make, and counts them."""
    if accepted <= EDGES_IN_MEMORY:
        edges = _edges(near / "edges").repartition(1)
        members = edges.map_batches(stars, batch_format="pyarrow", batch_size=None)
    else:
        members = spread(_edges(near / "edges"), shards)
    members = members.materialize()
    map_groups(_keyed(members, "b", shards), "shard", partial(_write_members, near=near)).materialize()
    sizes = map_groups(_keyed(members, "a", shards), "shard", _sizes).take_all()
    with (near / "groups").writing() as folder:
        for shard in range(shards):  # a small corpus leaves key ranges empty
            if not members_file(folder, shard).exists():
                write_members(folder, shard, EDGE.empty_table())
    return {
        "clusters": sum(row["clusters"] for row in sizes),
        "clustered_documents": sum(row["documents"] for row in sizes),
        "largest_cluster": max((row["largest"] for row in sizes), default=0),
    }


def _write_members(members: pa.Table, *, near: Folder) -> pa.Table:
    shard = members["shard"][0].as_py()
    with (near / "groups").writing() as folder:
        write_members(folder, shard, members)
    return pa.table({"members": [len(members)]})


def _sizes(members: pa.Table) -> pa.Table:
    """Numbers of the groups of a shard; the text that stands for a group is one of its documents."""
    sizes = members.group_by("a").aggregate([("b", "count")])["b_count"].to_numpy() + 1
    return pa.table({"clusters": [len(sizes)], "documents": [int(sizes.sum())], "largest": [int(sizes.max())]})
