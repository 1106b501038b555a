"""Measuring retrieval beside what it cannot do without: encoding, and the matrix products of queries and passages.

`evaluate` is a set of `--rows` queries and as many passages, all distinct, measured at four dims: encoding, exact
top 10, metrics by language with their intervals. `bare` is the engine's `embed` of the same texts and, at each of
the dims, the product of all queries with all passages, whose results are thrown away. `ratio` is the one's wall
time by the other's; `peak_gb` the most resident memory of the process while `evaluate` ran.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.encode import texts_of

DIVISORS = (1, 2, 4, 8)
BLOCK = 1024


class Peak(threading.Thread):
    """Looks at this process's resident memory ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.going = 0, True

    def run(self) -> None:
        """Until it is told to stop."""
        process = psutil.Process()
        while self.going:
            self.bytes = max(self.bytes, process.memory_info().rss)
            time.sleep(0.1)


def main() -> None:
    """Runs both and prints their times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000, help="queries, and passages")
    parser.add_argument("--words", type=int, default=12, help="most words of a text")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()

    from f2llm_ray.data.tokens.tokenizer import train_tokenizer
    from f2llm_ray.engine.engine import Engine
    from f2llm_ray.evaluate.tasks.retrieval_set import RetrievalSet
    from f2llm_ray.model.checkpoint import ModelInfo, matryoshka_dims, save_model
    from f2llm_ray.model.sizes import Shape, random_backbone

    torch.set_num_threads(arguments.threads)
    rows = arguments.rows
    most_n = np.random.default_rng(0).integers(3, arguments.words + 1, 2 * rows)
    texts = [
        " ".join([str(number), *text.split()[:most]])
        for number, (text, most) in enumerate(zip(texts_of(2 * rows, seed=0), most_n, strict=True))
    ]
    tokenizer = train_tokenizer(texts[:2000], 4000)
    shape = Shape(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, ffn=768)
    info = ModelInfo(
        name="bench", dims=matryoshka_dims(256), max_tokens=512, prompts={"query": ""}, instructions=False
    )
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), random_backbone(shape, tokenizer.get_vocab_size(), 0), tokenizer, info)
        engine = Engine(Path(folder))
    names = [str(number) for number in range(rows)]
    retrieval_set = RetrievalSet(
        name="bench",
        instruction="",
        query_ids=names,
        query_texts=texts[:rows],
        query_languages=[f"l{number % 50:02}" for number in range(rows)],
        corpus_ids=names,
        corpus_texts=texts[rows:],
        relevant=np.column_stack([np.arange(rows)] * 2),
    )
    engine.embed(texts[:512])

    peak = Peak()
    peak.start()
    started = time.perf_counter()
    scores = retrieval_set.measure(engine, DIVISORS).scores
    ours = time.perf_counter() - started
    peak.going = False
    peak.join()

    started = time.perf_counter()
    vectors_nd = torch.from_numpy(engine.embed(texts))
    encoded = time.perf_counter() - started
    started = time.perf_counter()
    for divisor in DIVISORS:
        cut_nd = torch.nn.functional.normalize(vectors_nd[:, : vectors_nd.shape[1] // divisor], dim=-1)
        for start in range(0, rows, BLOCK):
            torch.mm(cut_nd[start : min(start + BLOCK, rows)], cut_nd[rows:].T)
    products = time.perf_counter() - started
    result = {
        "rows": rows,
        "tokens": scores["tokens"],
        "threads": arguments.threads,
        "device": engine.device,
        "evaluate_s": round(ours, 1),
        "bare_encode_s": round(encoded, 1),
        "bare_products_s": round(products, 1),
        "ratio": round(ours / (encoded + products), 2),
        "peak_gb": round(peak.bytes / 1e9, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
