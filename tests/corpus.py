"""A small made-up corpus: three sources, one per task, and a held-out one, as files in users' layouts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

LANGUAGES = ("deu", "fra", "rus", "jpn")
STARTS, ENDS = ("ba", "ko", "mi", "tu", "re", "sa"), ("lan", "vor", "zik", "pem", "dus", "hox")
WORDS = [start + end for start in STARTS for end in ENDS]


def _sentence(generator: random.Random) -> list[str]:
    return generator.sample(WORDS, generator.randint(2, 5))


def _translated(words: list[str], language: str) -> str:
    return " ".join(f"{word[::-1]}{language[0]}" for word in words)


def write_corpus(folder: Path, rows: int = 300) -> dict[str, Any]:
    """Writes the files and returns a recipe over them; 3 rows stand twice and one is too long."""
    generator = random.Random(0)
    pairs = []
    for number in range(rows):
        words, language = _sentence(generator), LANGUAGES[number % 4]
        pairs.append({"q": _translated(words, language), "p": " ".join(words), "lang": language})
    pairs += pairs[:3]
    pairs.append({"q": "x" * 500, "p": "too long", "lang": "deu"})
    train, held = pairs[: -rows // 5], pairs[-rows // 5 : -4]
    train += pairs[-4:]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    pq.write_table(pa.Table.from_pylist(held), folder / "held.parquet")
    labels = [{"query": " ".join(_sentence(generator)), "passage": f"topic {n % 3}"} for n in range(60)]
    lines = [f"{row['query']},{row['passage']}" for row in labels]
    (folder / "labels.csv").write_text("\n".join(["query,passage", *lines]) + "\n")
    clusters = [
        {
            "query": " ".join(_sentence(generator)),
            "passage": " ".join(_sentence(generator)),
            "negative_1": "far away",
        }
        for _ in range(40)
    ]
    pq.write_table(pa.Table.from_pylist(clusters), folder / "clusters.parquet")
    columns = {"query": "q", "passage": "p", "language": "lang"}
    engine = {"precision": "fp32", "tokens_per_pass": 2048}
    training = {"global_batch": 16, "lr": 3e-3, "min_lr": 1e-4, "warmup_steps": 2, "engine": engine}
    return {
        "name": "small",
        "sources": {
            "pairs": {"format": "jsonl", "paths": [str(folder / "pairs.jsonl")], "columns": columns},
            "labels": {
                "format": "csv",
                "paths": [str(folder / "labels.csv")],
                "task": "classification",
                "language": "eng",
            },
            "clusters": {
                "format": "f2llm",
                "paths": [str(folder / "clusters.parquet")],
                "task": "clustering",
                "language": "eng",
            },
        },
        "data": {"max_chars": 400, "max_tokens": 32, "validation": 0.1, "shards": 2},
        "tokenizer": {"train_vocab": 400},
        "backbone": {"shape": {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 64}},
        "stages": {
            "stage1": {
                **training,
                "epochs": 2,
                "checkpoint_every": 4,
                "negatives": {"classification": 1, "clustering": 1},
            }
        },
        "prune": {"model": "stage1", "layers": 1, "hidden": 24, "ffn": 32, "calibration_rows": 30},
        "distill": {**training, "teacher": "stage1", "max_steps": 6},
        "evaluation": {
            "sets": {
                "held": {
                    "source": {"format": "parquet", "paths": [str(folder / "held.parquet")], "columns": columns}
                }
            }
        },
        "compute": {"workers": 2, "cpus_per_worker": 0.5},
    }


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    """Writes a recipe as YAML."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
