"""Bulk embedding beside the bare engine and `SentenceTransformer.encode`: same weights, texts and cores.

Bulk runs one actor per core, each with one thread; the two others run in this process with a thread per core. All
texts are distinct, so that nobody gains by leaving some out. Bulk reads parquet and writes shards; its rate is of
the time after the first actor was ready, and `bulk_startup_s` is what came before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.encode import seconds, texts_of


def main() -> None:
    """Runs all three and prints their rates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3, help="of bulk; of the others too")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    arguments = parser.parse_args()

    import ray
    from sentence_transformers import SentenceTransformer

    from f2llm_ray.base.session import connect
    from f2llm_ray.data.tokens.tokenizer import train_tokenizer
    from f2llm_ray.engine.engine import Engine
    from f2llm_ray.model.checkpoint import ModelInfo, matryoshka_dims, save_model
    from f2llm_ray.model.sizes import Shape, random_backbone
    from f2llm_ray.serve.bulk import run
    from f2llm_ray.serve.shards import EmbedJob

    texts = [f"{number} {text}" for number, text in enumerate(texts_of(arguments.rows, seed=0))]
    tokenizer = train_tokenizer(texts[:2000], 4000)
    shape = Shape(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, ffn=768)
    info = ModelInfo(
        name="bench", dims=matryoshka_dims(256), max_tokens=512, prompts={"query": ""}, instructions=False
    )
    torch.set_num_threads(arguments.cores)
    with tempfile.TemporaryDirectory() as folder:
        model, source = f"{folder}/model", f"{folder}/texts.parquet"
        save_model(Path(model), random_backbone(shape, tokenizer.get_vocab_size(), 0), tokenizer, info)
        pq.write_table(pa.table({"text": texts}), source)
        engine = Engine(Path(model))
        stock = SentenceTransformer(model, device=engine.device)
        tokens = sum(len(ids) for ids in engine.tokenize(texts, max_tokens=512))
        bare = tokens / statistics.median(seconds(lambda: engine.embed(texts), arguments.repeats))
        theirs = tokens / statistics.median(seconds(lambda: stock.encode(texts), arguments.repeats))
        # Small shards, so that all cores are busy to the end as they are over a real corpus.
        rows = max(128, arguments.rows // (20 * arguments.cores))
        connect()
        done = [
            run(
                EmbedJob(model=model, input=source, column="text", output=f"{folder}/{n}", shard_rows=rows),
                workers=arguments.cores,
            )
            for n in range(arguments.repeats)
        ]
        ray.shutdown()
    bulk = statistics.median(once["tokens_per_second"] for once in done)
    result = {
        "rows": len(texts),
        "tokens": tokens,
        "cores": arguments.cores,
        "device": engine.device,
        "bulk_tokens_per_s": round(bulk),
        "bulk_startup_s": [once["startup_seconds"] for once in done],
        "bare_tokens_per_s": round(bare),
        "sentence_transformers_tokens_per_s": round(theirs),
        "ratio_bare": round(bulk / bare, 3),
        "ratio_sentence_transformers": round(bulk / theirs, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
