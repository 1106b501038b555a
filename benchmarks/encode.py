"""Our engine beside `SentenceTransformer.encode`: same weights, same texts of natural lengths, same threads."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


def texts_of(rows: int, seed: int) -> list[str]:
    """Made-up texts with lognormal lengths, as passages have them: most short, some long."""
    generator = np.random.default_rng(seed)
    words = ["".join(generator.choice(list("abcdefghijklmnopqrstuvwxyz"), 5)) for _ in range(2000)]
    lengths = np.clip(generator.lognormal(2.5, 1.0, rows).astype(int), 1, 200)
    return [" ".join(generator.choice(words, length)) for length in lengths]


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each repeat, after one that warms up."""
    work()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return taken


def main() -> None:
    """Runs both, in turns, and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    from sentence_transformers import SentenceTransformer

    from f2llm_ray.data.tokens.tokenizer import train_tokenizer
    from f2llm_ray.engine.engine import Engine
    from f2llm_ray.model.checkpoint import ModelInfo, matryoshka_dims, save_model
    from f2llm_ray.model.sizes import Shape, random_backbone

    texts = texts_of(arguments.rows, seed=0)
    tokenizer = train_tokenizer(texts, 4000)
    shape = Shape(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, ffn=768)
    info = ModelInfo(
        name="bench", dims=matryoshka_dims(256), max_tokens=512, prompts={"query": ""}, instructions=False
    )
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), random_backbone(shape, tokenizer.get_vocab_size(), 0), tokenizer, info)
        engine = Engine(Path(folder))
        stock = SentenceTransformer(folder, device=engine.device)
    tokens = sum(len(ids) for ids in engine.tokenize(texts, max_tokens=512))
    ours = statistics.median(seconds(lambda: engine.embed(texts), arguments.repeats))
    theirs = statistics.median(seconds(lambda: stock.encode(texts), arguments.repeats))
    worst = float(np.min(np.sum(engine.embed(texts) * stock.encode(texts), axis=1)))
    result = {
        "texts": len(texts),
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "ours_tokens_per_s": round(tokens / ours),
        "sentence_transformers_tokens_per_s": round(tokens / theirs),
        "ratio": round(theirs / ours, 2),
        "worst_cosine": round(worst, 6),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
