"""A small decoder trained with exits beside the same without: what half of its layers keep of its score.

Eight layers, 128 channels, from scratch, on the retrieval sources of a corpus folder (one parquet file a source,
with the columns query, passage, language, passage_language and task_type), measured on retrieval sets that it
never saw. `elastic` has exits after 2, 4 and 6 layers, `plain` none; all else is the same, the number of steps
too. Each seed draws its own rows, batches and first weights. A score is the mean nDCG@10 over the sets, at the
full dim; the plain model at half its depth is cut as the other is.

A line for each seed; the last line is one JSON object: `half_depth_kept` and `plain_half_depth_kept`, the score
at half the depth over that at all of it, means over the seeds, and what they are made of. `whole_kept` is the
score of the elastic model at its whole depth over the plain one's: what the exits cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.experiment import retrieval_sources
from f2llm_ray.base.progress import say
from f2llm_ray.base.session import connect
from f2llm_ray.evaluate.measure import measure_folder
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.pipeline.work import on_worker
from f2llm_ray.recipe.files import load_recipe
from f2llm_ray.recipe.recipe import Recipe

LAYERS, HALF, EXITS = 8, 4, (2, 4, 6)
CAP = 2_000
"""Rows of a source: most of the corpus are short names, of a few sources."""


def recipe_of(given: argparse.Namespace, seed: int) -> Recipe:
    """Both trainings of a seed, each from the same untrained model."""
    stage = {
        "model": "untrained",
        "tasks": ["retrieval"],
        "instructions": False,
        "max_steps": given.steps,
        "global_batch": 128,
        "negatives": {},
        "lr": 2.5e-3,
        "min_lr": 1e-4,
        "warmup_steps": 10,
        "checkpoint_every": 10_000,
        "validation_rows": 128,
        "engine": {"precision": "fp32", "tokens_per_pass": 4096},
    }
    shape = {"hidden": 128, "layers": LAYERS, "heads": 2, "kv_heads": 2, "head_dim": 32, "ffn": 256}
    return load_recipe(
        {
            "name": "elastic-depth",
            "seed": seed,
            "sources": retrieval_sources(given.corpus, CAP),
            "data": {"max_chars": 500, "max_tokens": 32},
            "tokenizer": {"train_vocab": 16_000},
            "backbone": {"shape": shape},
            "stages": {"plain": stage, "elastic": {**stage, "elastic": {"layers": EXITS}}},
            "evaluation": {
                "sets": {
                    folder.name: {"folder": str(folder), "max_queries": given.queries}
                    for folder in sorted(given.heldout.iterdir())
                },
                "divisors": [1],
                "bm25": False,
            },
            "compute": {"workers": 2, "cpus_per_worker": 0.5},
        }
    )


def scores_of(given: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """nDCG@10 of both models by set and depth, such as "plain@4", and the mean over the sets."""
    pipeline = Pipeline(recipe_of(given, seed), str(given.out / f"seed{seed}"))
    for stage in pipeline.graph.making():
        pipeline.stage(stage)
    found: dict[str, dict[str, float]] = {}
    sets = pipeline.set_folders()
    for name in ("plain", "elastic"):
        folder = pipeline.run.folder(pipeline.graph.model(name).stage) / "model"
        for layers in (HALF, LAYERS):
            results = on_worker(measure_folder, folder, sets, (1,), None, layers)["results"]
            scores = {of: next(iter(facts["scores"].values()))["ndcg@10"] for of, facts in results.items()}
            found[f"{name}@{layers}"] = {**scores, "mean": statistics.mean(scores.values())}
    shown = ", ".join(f"{name} {scores['mean']:.4f}" for name, scores in found.items())
    say(f"seed {seed}: {shown}")
    return found


def summary(by_seed: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Shares, of which the first two are the benchmark's figures."""

    def kept(one: str, of: str) -> float:
        return round(statistics.mean(found[one]["mean"] / found[of]["mean"] for found in by_seed), 4)

    return {
        "half_depth_kept": kept(f"elastic@{HALF}", f"elastic@{LAYERS}"),
        "plain_half_depth_kept": kept(f"plain@{HALF}", f"plain@{LAYERS}"),
        "whole_kept": kept(f"elastic@{LAYERS}", f"plain@{LAYERS}"),
        "half_to_plain_whole": kept(f"elastic@{HALF}", f"plain@{LAYERS}"),
    }


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of sources")
    parser.add_argument("--heldout", type=Path, required=True, help="folder of retrieval sets")
    parser.add_argument("--steps", type=int, default=250, help="of each training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=1000, help="of each set, at most")
    parser.add_argument("--out", type=Path, default=Path("runs/elastic"))
    arguments = parser.parse_args()
    connect()
    by_seed = [scores_of(arguments, seed) for seed in range(1, arguments.seeds + 1)]
    result = {**summary(by_seed), "steps": arguments.steps, "seeds": by_seed}
    sys.stdout.write(f"{json.dumps(result)}\n")


if __name__ == "__main__":
    main()
