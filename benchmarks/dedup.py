"""Near dedup end to end beside datatrove's MinHash pipeline: same texts, shingles, bands, rows and cores.

The texts are made up, of the lengths that passages have, with planted near-duplicates of known Jaccard and decoys
below the threshold. `--scale` runs ours alone on 100,000 and 1,000,000 texts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import struct
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.memory import Peak
from f2llm_ray.base.session import connect

CORES = 2
FILES = 8
PLANTED = (0.98, 0.95, 0.9, 0.85)
DECOY = 0.4
SHARE_PLANTED, SHARE_DECOYS = 0.2, 0.05
SHINGLE = 5


def make_texts(rows: int, seed: int) -> tuple[list[str], list[tuple[int, int, float]]]:
    """Texts in a random order, and the planted pairs as (one, other, Jaccard of their shingles)."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = np.array(["".join(generator.choice(letters, generator.integers(2, 10))) for _ in range(50_000)])
    rank = np.arange(1, len(vocabulary) + 1)
    chance = (1 / (rank + 20)) / (1 / (rank + 20)).sum()  # Zipf's law, flattened at the top as stop words are many
    base = int(rows / (1 + SHARE_PLANTED + SHARE_DECOYS))
    lengths = np.clip(generator.lognormal(3.75, 0.5, base), 12, 400).astype(int)
    drawn = generator.choice(vocabulary, lengths.sum(), p=chance)
    words = [list(text) for text in np.split(drawn, np.cumsum(lengths)[:-1])]
    pairs = []
    for one in range(rows - base):
        target = PLANTED[one % len(PLANTED)] if one < base * SHARE_PLANTED else DECOY
        shingles = len(words[one]) - SHINGLE + 1
        # Replacing k words at the end changes k shingles of either text.
        k = max(1, round(shingles * (1 - target) / (1 + target)))
        words.append([*words[one][:-k], *(f"planted{one}x{place}" for place in range(k))])
        pairs.append((one, len(words) - 1, (shingles - k) / (shingles + k)))
    place = generator.permutation(rows)
    texts = [""] * rows
    for number, text in enumerate(words):
        texts[place[number]] = " ".join(text)
    return texts, [(int(place[one]), int(place[other]), jaccard) for one, other, jaccard in pairs]


def write_files(texts: list[str], folder: Path) -> None:
    """Writes the texts as FILES parquet files; text i is row i // FILES of file i % FILES."""
    folder.mkdir()
    for file in range(FILES):
        mine = texts[file::FILES]
        columns = {"query": mine, "passage": ["label"] * len(mine), "text": mine}
        pq.write_table(pa.table(columns), folder / f"{file}.parquet", row_group_size=50_000)


def ours(folder: Path, out: Path) -> tuple[float, dict[int, Any]]:
    """Seconds of near dedup from the cleaned rows on, and the group of each text that has one."""
    from f2llm_ray.data.flow import parts_of
    from f2llm_ray.data.near.find import find_groups
    from f2llm_ray.data.near.groups import Groups
    from f2llm_ray.data.read import write_rows
    from f2llm_ray.data.schema import key_numbers
    from f2llm_ray.recipe.files import parse
    from f2llm_ray.recipe.recipe import Recipe
    from f2llm_ray.run.folder import Folder

    recipe = parse(
        Recipe,
        {
            "name": "bench",
            # Texts with one label, so that only the texts are compared.
            "sources": {"texts": {"format": "parquet", "paths": [str(folder)], "task": "classification"}},
            "data": {"near_dedup": {"shingle": SHINGLE}},
            "tokenizer": {"train_vocab": 300},
            "backbone": {
                "shape": {"hidden": 32, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 32, "ffn": 32}
            },
            "stages": {"stage1": {"engine": {"precision": "fp32"}}},
        },
        "bench",
    )
    prepared = Folder.at(str(out))
    parts = parts_of(recipe.sources)
    rows, known = prepared / "rows", prepared / "parts"
    write_rows(recipe.sources, recipe.data, parts=parts, screen=None, rows=rows, known=known)
    near = recipe.data.near_dedup
    assert near is not None  # noqa: S101 (the recipe above has it)
    started = time.perf_counter()
    find_groups(near, {"texts": "classification"}, parts, prepared, recipe.data.shards)
    seconds = time.perf_counter() - started
    groups = Groups(out / "near" / "groups", recipe.data.shards)
    found: dict[int, Any] = {}
    for part in parts:
        file = int(Path(part.pieces[0]["file"]).stem)
        first = part.pieces[0]["first_row"]
        keys = key_numbers(pq.read_table(out / "rows" / part.file, columns=["query_key"])["query_key"])
        for row, group in enumerate(groups.of(keys).tolist()):
            found[(first + row) * FILES + file] = tuple(group)
    return seconds, found


def theirs(folder: Path, out: Path) -> tuple[float, dict[int, Any]]:
    """The same of datatrove: signatures, buckets and clusters; neither side writes what is left."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import minhash
    from datatrove.pipeline.readers import ParquetReader

    config = minhash.MinhashConfig(n_grams=SHINGLE, num_buckets=14, hashes_per_bucket=8)
    places = {name: str(out / name) for name in ("signatures", "buckets", "clusters")}
    steps: list[tuple[int, list[Any]]] = [
        (FILES, [ParquetReader(str(folder)), minhash.MinhashDedupSignature(places["signatures"], config=config)]),
        (14, [minhash.MinhashDedupBuckets(places["signatures"], places["buckets"], config=config)]),
        (
            1,
            [
                minhash.MinhashDedupCluster(
                    places["buckets"], places["clusters"], config=config, save_cluster_id=True
                )
            ],
        ),
    ]
    started = time.perf_counter()
    for number, (tasks, pipeline) in enumerate(steps):
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=CORES, logging_dir=str(out / f"logs-{number}")).run()
    seconds = time.perf_counter() - started
    found: dict[int, Any] = {}
    for path in Path(places["clusters"]).glob("*.clusters"):
        for row, cluster in struct.iter_unpack("<II", path.read_bytes()):
            found[row * FILES + int(path.stem)] = cluster
    return seconds, found


def compare(rows: int) -> dict[str, Any]:
    """Runs both on the same files."""
    from f2llm_ray.data.near.minhash import PRESETS

    texts, pairs = make_texts(rows, seed=0)
    connect()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(texts, folder / "texts")
        with Peak() as peak:
            our_seconds, our = ours(folder / "texts", folder / "ours")
        their_seconds, their = theirs(folder / "texts", folder / "theirs")
    threshold, lsh = 0.7, PRESETS["standard"]
    same = [(our[a] == our[b], a in their and their[a] == their.get(b), j) for a, b, j in pairs]
    near = [entry for entry in same if entry[2] >= threshold]
    ours_found = [entry for entry in same if entry[0]]
    wanted = {frozenset(pair[:2]) for pair in pairs if pair[2] >= threshold}
    removed = [found for found in same if found[1] and found[2] >= threshold]
    grouped: dict[Any, list[int]] = defaultdict(list)
    for text, group in our.items():
        grouped[group].append(text)
    merged = [members for members in grouped.values() if len(members) > 1]
    right = [members for members in merged if wanted & _pairs(members)]
    return {
        "rows": rows,
        "ours_docs_per_s_core": round(rows / our_seconds / CORES),
        "datatrove_docs_per_s_core": round(rows / their_seconds / CORES),
        "ratio": round(their_seconds / our_seconds, 1),
        "recall_planted": round(sum(entry[0] for entry in near) / len(near), 4),
        "recall_analytic": round(sum(lsh.probability(entry[2]) for entry in near) / len(near), 4),
        "recall_datatrove": round(sum(entry[1] for entry in near) / len(near), 4),
        "recall_vs_peer": round(sum(entry[0] for entry in removed) / max(len(removed), 1), 4),
        "precision_planted": round(len(right) / max(len(merged), 1), 4),
        "decoys_found": sum(entry[2] < threshold for entry in ours_found),
        "decoys_found_by_datatrove": sum(entry[1] and entry[2] < threshold for entry in same),
        "peak_rss_mb": round(peak.mb),
    }


def _pairs(members: list[int]) -> set[frozenset[int]]:
    return {frozenset((a, b)) for a in members for b in members if a < b}


def scale() -> dict[str, Any]:
    """Ours alone at two sizes."""
    taken = {}
    with tempfile.TemporaryDirectory() as name:
        folders = {rows: Path(name) / str(rows) for rows in (100_000, 1_000_000)}
        for rows, folder in folders.items():
            folder.mkdir()
            # In a process of its own, whose memory is not counted.
            generate = multiprocessing.get_context("spawn").Process(target=_generate, args=(rows, folder))
            generate.start()
            generate.join()
        connect()
        with Peak() as peak:
            for rows, folder in folders.items():
                taken[rows], _ = ours(folder / "texts", folder / "ours")
    small, large = taken.values()
    return {
        "t_100k": round(small, 1),
        "t_1m": round(large, 1),
        "growth": round(large / small, 2),
        "peak_rss_mb": round(peak.mb),
    }


def _generate(rows: int, folder: Path) -> None:
    write_files(make_texts(rows, seed=0)[0], folder / "texts")


def main() -> None:
    """Runs what is asked for and prints one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--scale", action="store_true", help="ours alone on 100,000 and 1,000,000 texts")
    arguments = parser.parse_args()
    print(json.dumps(scale() if arguments.scale else compare(arguments.rows)))


if __name__ == "__main__":
    main()
