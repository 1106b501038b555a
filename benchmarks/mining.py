"""Our mining beside sentence-transformers' `mine_hard_negatives`: same vectors, parameters, machine and threads.

Both find the nearest passages of every query and filter them; nothing is encoded. Ours is the stage's own code in
one process without Ray, from numbering the texts to the written file, with vectors mapped from disk. Theirs gets
the vectors in memory from a stand-in for the model, and its texts are short names.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq

from f2llm_ray.data.schema import KEY, seeded_key
from f2llm_ray.engine.vector_files import shard_name
from f2llm_ray.mine.candidates import Candidates, number_texts
from f2llm_ray.mine.join_negatives import join_source
from f2llm_ray.mine.search import FOUND, Layout, found_name, search
from f2llm_ray.mine.settings import Mine
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    import torch

Floats = np.ndarray[Any, np.dtype[np.float32]]
PER_CLUSTER = 50
LAYOUT = Layout()


def pairs_of(rows: int, dim: int, seed: int) -> tuple[Floats, Floats]:
    """Unit vectors [rows, dim] of queries and of their passages, which lie in clusters, some tight and some loose.

    A passage is a centre and noise, its query the passage and noise, so that every limit takes some neighbours.
    """
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((max(1, rows // PER_CLUSTER), dim), dtype=np.float32)
    topics = centres[generator.integers(0, len(centres), rows)]
    scales = generator.uniform(0.1, 1.1, (2, rows, 1)).astype(np.float32)
    passages = topics + scales[0] * generator.standard_normal((rows, dim), dtype=np.float32)
    queries = passages + scales[1] * generator.standard_normal((rows, dim), dtype=np.float32)
    queries, passages = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, passages))
    return rounded(queries), rounded(passages)


def rounded(vectors: Floats) -> Floats:
    """What float16 keeps of vectors: both sides work with the same numbers."""
    return vectors.astype(np.float16).astype(np.float32)


def write_input(folder: Path, queries: Floats, passages: Floats) -> None:
    """What our stage finds: the prepared table, and the vectors in key order."""
    keys = [[seeded_key(side, n) for n in range(len(queries))] for side in ("query", "passage")]
    columns = {name: pa.array(keys[0], KEY) for name in ("row_key", "query_key", "query_group")}
    columns |= {name: pa.array(keys[1], KEY) for name in ("passage_key", "passage_group")}
    columns["negative_keys"] = pa.array([[]] * len(queries), pa.list_(KEY))
    (folder / "table").mkdir()
    pq.write_table(pa.table(columns).sort_by("row_key"), folder / "table" / "bench.parquet")
    order = np.argsort(np.array([*keys[0], *keys[1]], dtype="V16").view("S16"))
    vectors, at = np.concatenate([queries, passages]).astype(np.float16), Folder.at(str(folder / "vectors"))
    for first in range(0, len(order), LAYOUT.texts):
        at.write_array(shard_name(first // LAYOUT.texts), vectors[order[first : first + LAYOUT.texts]])


def plan(out: Folder) -> None:
    """Numbers the texts, as the stage's first step does."""
    columns = ["query_key", "passage_key", "query_group", "passage_group"]
    number_texts((out / "table").read_table("bench.parquet", columns), "query_key").save(out / "plan" / "bench")


def search_all(out: Folder, settings: Mine) -> None:
    """Searches all shards of queries, as the stage's tasks do."""
    found = Candidates.load(out / "plan" / "bench")
    for shard in range(-(-len(found.queries) // LAYOUT.queries)):
        rows, dropped = search(found, out / "vectors", shard, settings, layout=LAYOUT)
        schema = FOUND.with_metadata({"dropped": json.dumps(dropped)})
        (out / "found" / "bench").write_table(found_name(shard), [rows], schema)


def ours(out: Folder, settings: Mine) -> tuple[list[float], dict[str, Any]]:
    """Mines; returns the seconds of planning, searching and joining, and the facts of the source."""
    times = [time.perf_counter()]
    plan(out)
    times.append(time.perf_counter())
    search_all(out, settings)
    times.append(time.perf_counter())
    facts = join_source("bench", out, out, settings.count)
    times.append(time.perf_counter())
    return np.diff(times).tolist(), facts


class Stub:
    """A model that has the vectors ready; dot products of unit vectors are the cosines."""

    def __init__(self, queries: Floats, passages: Floats) -> None:
        import torch

        self.queries, self.passages, self.device = queries, passages, torch.device("cpu")

    def encode_query(self, texts: list[str], **_: Any) -> Floats:
        """Their vectors."""
        return self.queries[[int(text[1:]) for text in texts]]

    def encode_document(self, texts: list[str], **_: Any) -> Floats:
        """Their vectors."""
        return self.passages[[int(text[1:]) for text in texts]]

    def similarity(self, left: Floats, right: Floats) -> torch.Tensor:
        """Of all pairs."""
        from sentence_transformers.util import dot_score

        scores: torch.Tensor = dot_score(left, right)
        return scores

    def similarity_pairwise(self, left: Floats, right: Floats) -> torch.Tensor:
        """Of each row's pair."""
        from sentence_transformers.util import pairwise_dot_score

        scores: torch.Tensor = pairwise_dot_score(left, right)
        return scores


def theirs(queries: Floats, passages: Floats, settings: Mine) -> dict[int, set[int]]:
    """Negatives of each row by `mine_hard_negatives`, in the output format with the least work per row."""
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    rows = range(len(queries))
    dataset = Dataset.from_dict({"query": [f"q{n}" for n in rows], "passage": [f"p{n}" for n in rows]})
    mined = mine_hard_negatives(
        dataset,
        Stub(queries, passages),
        range_min=settings.skip,
        range_max=settings.top_k,
        max_score=settings.max_score,
        relative_margin=settings.relative_margin,
        num_negatives=settings.count,
        output_format="labeled-list",
        verbose=False,
    )
    found: dict[int, set[int]] = {n: set() for n in rows}
    for query, texts in zip(mined["query"], mined["passage"], strict=True):
        found[int(query[1:])] = {int(text[1:]) for text in texts[1:]}
    return found


def same_share(folder: Path, expected: dict[int, set[int]]) -> float:
    """Share of the rows for which both found the same set."""
    table = pq.read_table(folder / "bench.parquet")
    row = {seeded_key("query", n): n for n in expected}
    passage = {seeded_key("passage", n): n for n in expected}
    columns = (table[name].to_pylist() for name in ("row_key", "negative_keys"))
    same = [{passage[key] for key in keys} == expected[row[name]] for name, keys in zip(*columns, strict=True)]
    return round(statistics.mean(same), 4)


def hnsw(queries: Floats, passages: Floats, k: int, threads: int) -> dict[str, float]:
    """Seconds and recall of an approximate index, for one shard of queries: needs `pip install faiss-cpu`."""
    import faiss  # type: ignore[import-not-found, unused-ignore]

    faiss.omp_set_num_threads(threads)
    queries = queries[: LAYOUT.queries]
    index = faiss.IndexHNSWFlat(passages.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = 100, max(128, k)
    started = time.perf_counter()
    index.add(passages)
    built = time.perf_counter()
    _, found = index.search(queries, k)
    seconds = (time.perf_counter() - built) * len(passages) / len(queries)
    exact = faiss.IndexFlatIP(passages.shape[1])
    exact.add(passages)
    _, expected = exact.search(queries, k)
    recall = statistics.mean(len({*a} & {*b}) / k for a, b in zip(found.tolist(), expected.tolist(), strict=True))
    return {"build_s": round(built - started, 2), "search_s": round(seconds, 2), "recall": round(recall, 3)}


def peak_rss_mb(rows: int, dim: int, top_k: int, threads: int) -> int:
    """Most memory that a process of its own held while it searched all queries, the libraries included.

    The first and last step of mining hold a source's ids, no vectors, and are left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_input(Path(folder), *pairs_of(rows, dim, 0))
        plan(Folder.at(folder))
        arguments = ["--child", folder, "--top-k", str(top_k), "--threads", str(threads)]
        command = [sys.executable, "-m", "benchmarks.mining", *arguments]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
    return int(json.loads(output.splitlines()[-1])["peak_rss_mb"])


def child(out: Folder, settings: Mine) -> None:
    """Searches in this process and prints its peak: VmHWM, since ru_maxrss starts with the parent's."""
    search_all(out, settings)
    (line,) = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM")]
    print(json.dumps({"peak_rss_mb": int(line.split()[1]) // 1024}))


def main() -> None:
    """Runs both in turns, and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=int, default=20_000, help="rows: as many queries as passages")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hnsw", action="store_true", help="also an approximate index; needs faiss-cpu")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    settings = Mine(model="bench", top_k=arguments.top_k)
    # Where nothing is skipped, both mean the same by their parameters: see `mine.search.choose`.
    unskipped = settings.model_copy(update={"skip": 0})
    if arguments.child is not None:
        child(Folder.at(arguments.child), settings)
        return
    queries, passages = pairs_of(arguments.docs, arguments.dim, 0)
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Folder.at(name)
        write_input(folder, queries, passages)
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        steps = []
        for _ in range(arguments.repeats):
            seconds, facts = ours(out, settings)
            steps.append(seconds)
            times["ours"].append(sum(seconds))
            started = time.perf_counter()
            skipped = theirs(queries, passages, settings)
            times["theirs"].append(time.perf_counter() - started)
        same_skipped = same_share(folder, skipped)
        ours(out, unskipped)
        same = same_share(folder, theirs(queries, passages, unskipped))
    mine, peer = (statistics.median(times[who]) for who in ("ours", "theirs"))
    rss = {n: peak_rss_mb(n, arguments.dim, arguments.top_k, arguments.threads)
           for n in (arguments.docs, 4 * arguments.docs)}  # fmt: skip
    result = {
        "docs": arguments.docs,
        "dim": arguments.dim,
        "threads": arguments.threads,
        "ours_s": round(mine, 2),
        "ours_steps_s": dict(
            zip(("plan", "search", "join"), np.median(steps, axis=0).round(2).tolist(), strict=True)
        ),
        "sentence_transformers_s": round(peer, 2),
        "ratio": round(peer / mine, 2),
        "same_negatives": same,
        "same_negatives_with_skip": same_skipped,
        "facts": facts,
        "peak_rss_mb": rss,
    }
    if arguments.hnsw:
        result["hnsw"] = hnsw(queries, passages, arguments.top_k, arguments.threads)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
