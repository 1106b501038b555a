"""Near dedup: groups of texts that say nearly the same, by MinHash-LSH on Ray Data.

bands (each part: its texts' shingles, signatures and band keys) -> pairs (each shard of band keys: the smallest
text of a bucket tied to the others) -> edges (each shard of pairs: those whose shingles have the Jaccard asked
for) -> groups (what is connected; its smallest key stands for it). Between steps only keys and places move, as
shuffle files; text is read once, and every step goes on from the files that are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_ray.base import formatting
from f2llm_ray.base.progress import say
from f2llm_ray.data.flow import Item, Part, each, map_groups
from f2llm_ray.data.keys import shard_of
from f2llm_ray.data.near.components import EDGE, spread, stars
from f2llm_ray.data.near.groups import NAMES, write_members
from f2llm_ray.data.near.minhash import PRESETS, band_keys, signatures
from f2llm_ray.data.near.shingle_store import ShingleStore, jaccards, write_shingles
from f2llm_ray.data.near.shingles import Shingles, shingle
from f2llm_ray.data.near.shuffle import Rows, read_shard, write_rows
from f2llm_ray.data.schema import Task, key_array, key_numbers
from f2llm_ray.data.settings import NearDedup
from f2llm_ray.run.folder import Folder

# Texts whose bands one file holds: 90 MB with 14 bands.
TEXTS_PER_FILE = 200_000
# Pairs checked at once: their shingles take some 10 MB.
CHECKED_AT_ONCE = 10_000
# Edges that one process connects; 5 million take about 1 GB while their ends are numbered.
EDGES_IN_MEMORY = 5_000_000
FACTS = "near.json"
TOLD = (0.7, 0.8, 0.9)
"""Jaccards of pairs for which the terminal says how many of them are found."""


def find_groups(
    settings: NearDedup, tasks: Mapping[str, Task], parts: list[Part], prepared: Folder, shards: int
) -> dict[str, Any]:
    """Writes `near/`: the groups of all texts of the rows that are still in.

    Labels of classification sources take no part: two labels that read alike are still two.

    Args:
        settings: how alike two texts must be.
        tasks: the task of each source.
        parts: the parts of the sources.
        prepared: folder with `rows/`.
        shards: key ranges.

    Returns:
        What the data card says of it: settings, curve, and the numbers of documents, pairs and groups.
    """
    near = prepared / "near"
    if near.exists(FACTS):
        return dict(near.read_json(FACTS))
    lsh = PRESETS[settings.preset]
    alike = (
        "" if settings.min_jaccard is None else f" that share {settings.min_jaccard:.0%} of their parts or more"
    )
    found_at = formatting.listed([f"{lsh.probability(j):.0%} of those at {j:.0%}" for j in TOLD])
    say(f"prepare: near-duplicates: looking for texts{alike}; it finds {found_at}")
    bands = partial(
        _bands, parts=parts, settings=settings, tasks=tasks, rows=prepared / "rows", near=near, shards=shards
    )
    list(each("prepare: near-duplicates: signatures", [{"part": number} for number in range(len(parts))], bands))
    tied = [{"shard": shard} for shard in range(shards)]
    tie = partial(_pairs, near=near, shards=shards)
    entries = sum(found["entries"] for found in each("prepare: near-duplicates: candidates", tied, tie))
    check = partial(_edges, near=near, shards=shards, threshold=settings.min_jaccard)
    settled = list(each("prepare: near-duplicates: compared", tied, check))
    candidates, accepted = (sum(found[name] for found in settled) for name in ("candidates", "accepted"))
    found = {
        **settings.model_dump(mode="json"),
        "bands": lsh.bands,
        "rows": lsh.rows,
        "curve": [[j / 20, round(lsh.probability(j / 20), 4)] for j in range(21)],
        "documents": entries // lsh.bands,
        "candidates": candidates,
        "accepted": accepted,
        **(_connect(near, shards) if accepted <= EDGES_IN_MEMORY else _connect_spread(near, shards)),
    }
    near.write_json(FACTS, found)
    for done in ("bands", "pairs", "shingles"):
        (near / done).clear()
    return found


def _documents(part: Part, task: Task, rows: Folder) -> Iterator[tuple[Rows, list[str]]]:
    """The distinct texts of a part's rows that are still in, and their keys [n, 2], some thousand rows a time."""
    sides = {"query": "query_key"}
    if task != "classification":
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
            yield np.frombuffer(b"".join(texts), ">u8").reshape(-1, 2).astype(np.uint64), list(texts.values())


def _bands(
    item: Item,
    *,
    parts: list[Part],
    settings: NearDedup,
    tasks: Mapping[str, Task],
    rows: Folder,
    near: Folder,
    shards: int,
) -> Item:
    """Writes the band keys of a part's texts as rows (band, key, place), and their shingles at those places."""
    part = parts[item["part"]]
    done = f"{part.number:06d}.done"
    if near.exists(f"bands/{done}"):
        return item
    lsh = PRESETS[settings.preset]
    kept: list[Shingles] = []
    waiting: list[Rows] = []
    files = count = 0

    def flush() -> None:
        nonlocal files
        if waiting:
            found = np.concatenate(waiting)
            shard = (found[:, 0] >> np.uint64(32)) * np.uint64(shards) >> np.uint64(32)
            write_rows(near / "bands", f"{part.number:06d}-{files:04d}", found, shard.astype(np.int64), shards)
            waiting.clear()
            files += 1

    for keys, texts in _documents(part, tasks[part.source], rows):
        shingles = shingle(texts, settings.shingle)
        bands = band_keys(signatures(shingles, lsh.bands * lsh.rows), lsh)
        place = np.uint64(part.number << 32) + np.arange(count, count + len(texts), dtype=np.uint64)
        documents = np.repeat(np.column_stack([keys, place]), lsh.bands, axis=0)
        waiting.append(np.column_stack([bands.ravel(), documents]))
        if settings.min_jaccard is not None:
            kept.append(shingles)
        count += len(texts)
        if sum(map(len, waiting)) >= TEXTS_PER_FILE * lsh.bands:
            flush()
    flush()
    if kept:
        with (near / "shingles").writing() as folder:
            write_shingles(folder, part.number, kept)
    (near / "bands").write_bytes(done, b"")
    return item


def _pairs(item: Item, *, near: Folder, shards: int) -> Item:
    """Ties the smallest key of each bucket of a shard to the others: rows (key, place, key, place)."""
    shard = item["shard"]
    rows = read_shard(near / "bands", shard, shards, 4)
    total = len(rows)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    same = rows[1:, 0] == rows[:-1, 0]
    rows = rows[np.append(same, False) | np.append(False, same)]  # most buckets hold one text
    rows = rows[np.lexsort(rows.T[::-1])]
    new_band = np.append(True, rows[1:, 0] != rows[:-1, 0])[: len(rows)]
    new_key = np.append(True, (rows[1:, 1:3] != rows[:-1, 1:3]).any(axis=1))[: len(rows)]
    new_text = new_band | new_key
    head = np.flatnonzero(new_band)[np.cumsum(new_band) - 1]
    others = np.flatnonzero(new_text & ~new_band)
    pairs = _distinct(np.column_stack([rows[head[others], 1:], rows[others, 1:]]))
    write_rows(near / "pairs", f"{shard:04d}", pairs, shard_of(pairs[:, 3:5], shards), shards)
    return {"entries": total - int((~new_text).sum())}


def _distinct(pairs: Rows) -> Rows:
    """Pairs sorted by their keys, each once, whatever the places."""
    pairs = pairs[np.lexsort(pairs.T[[5, 2, 4, 3, 1, 0]])]
    keys = pairs[:, [0, 1, 3, 4]]
    return pairs[np.append(True, (keys[1:] != keys[:-1]).any(axis=1))[: len(pairs)]]


def _edges(item: Item, *, near: Folder, shards: int, threshold: float | None) -> Item:
    """Writes the distinct pairs of a shard, those whose texts have at least this Jaccard where one is given."""
    shard = item["shard"]
    pairs = edges = _distinct(read_shard(near / "pairs", shard, shards, 6))
    if threshold is not None and len(pairs):
        with (near / "shingles").as_local() as folder:
            store = ShingleStore(folder)
            kept = [
                jaccards(store.at(some[:, 2]), store.at(some[:, 5])) >= threshold
                for some in np.array_split(pairs, -(-len(pairs) // CHECKED_AT_ONCE))
            ]
        edges = pairs[np.concatenate(kept)]
    ends = [key_array(edges[:, first : first + 2]) for first in (0, 3)]
    (near / "edges").write_table(f"{shard:04d}.parquet", [pa.table(ends, schema=EDGE)], EDGE)
    return {"candidates": len(pairs), "accepted": len(edges)}


# From edges to groups.


def _connect(near: Folder, shards: int) -> dict[str, int]:
    """Writes the groups that the edges make, in one task, and counts them."""
    import ray

    return dict(ray.get(ray.remote(_connect_here).remote(near, shards)))


def _connect_here(near: Folder, shards: int) -> dict[str, int]:
    edges = near / "edges"
    members = stars(pa.concat_tables([edges.read_table(name) for name in edges.files(".parquet")]))
    shard = shard_of(key_numbers(members["b"]), shards)
    with (near / "groups").writing() as folder:
        for number in range(shards):
            write_members(folder, number, members.filter(pa.array(shard == number)))
    return _summed([_sizes(members).to_pylist()[0]])


def _connect_spread(near: Folder, shards: int) -> dict[str, int]:
    """The same for more edges than one process holds."""
    import ray.data

    edges = near / "edges"
    names = edges.files(".parquet")
    files = ray.data.from_items([{"file": name} for name in names], override_num_blocks=len(names))
    read = files.map_batches(partial(_read_edges, folder=edges), batch_size=1, batch_format="pyarrow")
    members = spread(read, shards)
    by_member, by_group = (
        members.map_batches(
            partial(_with_shard, column=end, shards=shards), batch_format="pyarrow", batch_size=None
        )
        for end in ("b", "a")
    )
    map_groups(by_member, "shard", partial(_write_members, near=near)).materialize()
    sizes = map_groups(by_group, "shard", _sizes).take_all()
    with (near / "groups").writing() as folder:
        for shard in range(shards):  # a key range may be empty
            if not (folder / NAMES[0].format(shard)).exists():
                write_members(folder, shard, EDGE.empty_table())
    return _summed(sizes)


def _read_edges(files: pa.Table, *, folder: Folder) -> pa.Table:
    (name,) = files["file"].to_pylist()
    return folder.read_table(name)


def _with_shard(table: pa.Table, *, column: str, shards: int) -> pa.Table:
    if not table.num_columns:  # a block that had no rows
        return table
    return table.append_column("shard", pa.array(shard_of(key_numbers(table[column]), shards)))


def _write_members(members: pa.Table, *, near: Folder) -> pa.Table:
    shard = members["shard"][0].as_py()
    with (near / "groups").writing() as folder:
        write_members(folder, shard, members)
    return pa.table({"members": [len(members)]})


def _sizes(members: pa.Table) -> pa.Table:
    """Numbers of the groups whose smallest keys are `a`; that text is one of its group's documents."""
    sizes = members.group_by("a").aggregate([("b", "count")])["b_count"].to_numpy() + 1
    return pa.table(
        {"clusters": [len(sizes)], "documents": [int(sizes.sum())], "largest": [int(sizes.max(initial=0))]}
    )


def _summed(sizes: list[dict[str, int]]) -> dict[str, int]:
    return {
        "clusters": sum(row["clusters"] for row in sizes),
        "clustered_documents": sum(row["documents"] for row in sizes),
        "largest_cluster": max((row["largest"] for row in sizes), default=0),
    }
