"""A ready encoder adapted to a corpus: tuned, pruned and taught, beside the same minutes of sentence-transformers.

The recipe is `adapt-e5-small`, on the retrieval sources of a corpus folder (one parquet file a source, with the
columns query, passage, language, passage_language and task_type), measured on retrieval sets that it never saw.
Of `--minutes` the tuned model trains for 2/5, the distilled one for 1/5, and sentence-transformers' trainer for
2/5 on the same rows, with the same learning rate, word embeddings frozen as in ours, and one source a batch;
how many steps that is, a few steps tell. Data steps and evaluation come on top: hours on two cores.

The last line is one JSON object: `gain_low` (lower end of the 95 % interval of tuned minus untuned nDCG@10, the
worse of the sets), `kept` (distilled over tuned, the worse set), `speedup` (texts per second of one thread,
distilled over tuned), `ratio_st` (tuned over sentence-transformers, the worse set), and what they are made of.
Model folders stay in `--out`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from benchmarks.experiment import ndcg, retrieval_sources, train_until
from f2llm_ray.base.progress import say
from f2llm_ray.base.session import connect
from f2llm_ray.data.flow import part_file
from f2llm_ray.data.tokens.build import read_prompts
from f2llm_ray.engine.engine import Engine
from f2llm_ray.pipeline.compare import compare
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.recipe.files import load_recipe
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.settings import TrainStage

RECIPE = "adapt-e5-small"
SHARES = {"tuned": 0.4, "distilled": 0.2, "st": 0.4}
CAP = 12_000
"""Rows of a source: four fifths of the corpus are short names, of a few sources."""
PLACES = {"tuned": "stages.tuned", "distilled": "distill"}
"""Where the recipe says the stages that train."""
PROBE_STEPS = 12
TIMED, ROUNDS = 512, 3


def recipe_of(given: argparse.Namespace, steps: Mapping[str, int]) -> Recipe:
    """The recipe on a corpus, with so many steps of the stages that are named."""
    backbone, corpus, heldout, queries = given.backbone, given.corpus, given.heldout, given.queries
    sources = retrieval_sources(corpus, CAP)
    sets = {folder.name: {"folder": str(folder), "max_queries": queries} for folder in sorted(heldout.iterdir())}
    changes = [
        f"backbone.path={backbone}",
        f"sources={json.dumps(sources)}",
        f"evaluation.sets={json.dumps(sets)}",
        f"data.max_tokens={given.max_tokens}",
        "compute={workers: 2, cpus_per_worker: 0.5}",
        *(f"{PLACES[stage]}.max_steps={count}" for stage, count in steps.items()),
    ]
    return load_recipe(RECIPE, changes)


class Adapting:
    """The runs of one experiment in one root."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.given = arguments
        self.root = str(arguments.out / "run")
        self.steps: dict[str, int] = {}

    def pipeline(self, **steps: int) -> Pipeline:
        """The run with so many steps, those found so far where nothing else is said."""
        found = {**dict.fromkeys(PLACES, PROBE_STEPS), **self.steps, **steps}
        return Pipeline(recipe_of(self.given, found), self.root)

    def find_steps(self, stage: str) -> None:
        """How many steps of a stage fit into its share of the minutes, by a probe of some."""
        each = train_until(self.pipeline(**{stage: PROBE_STEPS}), stage) / PROBE_STEPS
        self.steps[stage] = max(PROBE_STEPS + 1, round(60 * self.given.minutes * SHARES[stage] / each))
        say(f"{stage}: {each:.2f} s a step, {self.steps[stage]} steps")


def rows_of(pipeline: Pipeline) -> dict[str, list[dict[str, str]]]:
    """Queries and passages that are trained on, by source, with their prompts."""
    prepared = pipeline.run.folder(pipeline.graph.prepare)
    prompts = read_prompts(prepared)
    rows = prepared / "rows"
    texts = {name: rows.read_table(name, ["query", "passage"]).to_pydict() for name in rows.files(".parquet")}
    found = {}
    for source in pipeline.recipe.sources:
        table = (prepared / "table").read_table(f"{source}.parquet", ["piece", "position", "validation"])
        table = table.filter(pc.invert(table["validation"]))
        places = [(texts[part_file(row["piece"])], row["position"]) for row in table.to_pylist()]
        found[source] = [
            {
                "query": prompts.query + own["query"][place],
                "passage": prompts.document + own["passage"][place],
            }
            for own, place in places
        ]
    return found


def sentence_transformers(pipeline: Pipeline, backbone: Path, seconds: float, out: Path) -> dict[str, Any]:
    """Trains the backbone with sentence-transformers for so long, on the same rows, and saves it."""
    from datasets import Dataset, DatasetDict
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    stage = pipeline.recipe.stages["tuned"]
    assert isinstance(stage, TrainStage)  # noqa: S101 - the recipe has it
    torch.set_num_threads(2)
    rows = DatasetDict({name: Dataset.from_list(found) for name, found in rows_of(pipeline).items()})

    class Clock(TrainerCallback):
        started = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.monotonic()

        def on_step_end(self, _arguments: Any, _state: Any, control: Any, **__: Any) -> None:
            control.should_training_stop |= time.monotonic() - self.started > seconds

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.monotonic() - self.started

    def train(steps: int) -> tuple[Any, float]:
        model = SentenceTransformer(str(backbone), device="cpu")
        model.max_seq_length = pipeline.recipe.data.max_tokens
        model[0].auto_model.get_input_embeddings().requires_grad_(False)
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(out / "trainer"),
            per_device_train_batch_size=stage.global_batch,
            max_steps=steps,
            learning_rate=stage.lr,
            warmup_steps=min(stage.warmup_steps, steps // 10),
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        clock, loss = Clock(), MultipleNegativesRankingLoss(model, scale=1 / stage.temperature)
        trainer = SentenceTransformerTrainer(model, arguments, rows, loss=loss, callbacks=[clock])
        trainer.train()
        return model, clock.seconds

    each = train(PROBE_STEPS)[1] / PROBE_STEPS
    steps = round(seconds / each)
    model, spent = train(steps)
    model.max_seq_length = pipeline.recipe.model_tokens  # as ours: it reads longer texts than it was trained on
    model.save(str(out / "sentence-transformers"))
    return {"steps": steps, "seconds": round(spent)}


def texts_per_second(models: Mapping[str, Path], texts: list[str]) -> dict[str, float]:
    """Of one thread, medians of rounds in which the models take turns."""
    torch.set_num_threads(1)
    engines = {name: Engine(folder) for name, folder in models.items()}
    spent: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(ROUNDS):
        for name, engine in engines.items():
            started = time.perf_counter()
            engine.embed(texts, prompt=engine.info.prompts["document"])
            spent[name].append(time.perf_counter() - started)
    return {name: round(len(texts) / statistics.median(seconds), 1) for name, seconds in spent.items()}


def summary(pipeline: Pipeline, out: Path, corpus: Path) -> dict[str, Any]:
    """The figures of a finished run and the peer's model; a set's passages are what is timed."""
    report = pipeline.report()
    scores = {model["name"]: model["scores"] for model in report["models"]}
    peer = str(out / "sentence-transformers")
    gained = compare(pipeline, ["untrained", "tuned"])
    beside = compare(pipeline, [peer, "tuned"])
    sets = list(pipeline.graph.sets)
    full = {model["name"]: {name: ndcg(model, name) for name in sets} for model in report["models"]}
    of_peer = {row["set"]: full["tuned"][row["set"]] - row["difference"] for row in beside}
    folders = {
        name: Path(str(pipeline.run.folder(pipeline.graph.model(name).stage).local)) / "model"
        for name in ("untrained", "tuned", "pruned", "distilled", "distilled-int8")
    }
    texts = pq.read_table(corpus, columns=["passage"])["passage"].to_pylist()
    texts = [texts[place] for place in np.linspace(0, len(texts) - 1, TIMED).astype(int)]
    rates = texts_per_second(folders, texts)
    return {
        "gain_low": min(row["low"] for row in gained),
        "kept": round(min(full["distilled"][name] / full["tuned"][name] for name in sets), 4),
        "speedup": round(rates["distilled"] / rates["tuned"], 2),
        "ratio_st": round(min(full["tuned"][name] / of_peer[name] for name in sets), 4),
        "gains": {row["set"]: [row["difference"], row["low"], row["high"]] for row in gained},
        "beside_st": {row["set"]: [row["difference"], row["low"], row["high"]] for row in beside},
        "scores": scores,
        "bm25": {name: ndcg(report["baselines"][0], name) for name in report["baselines"][0]["scores"]},
        "texts_per_second": rates,
        "bytes": {model["name"]: model["bytes"] for model in report["models"]},
        "parameters": {model["name"]: model["parameters"] for model in report["models"]},
    }


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, required=True, help="a folder of sentence-transformers")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of sources")
    parser.add_argument("--heldout", type=Path, required=True, help="folder of retrieval sets")
    parser.add_argument("--minutes", type=float, default=60, help="of training, all models together")
    parser.add_argument("--queries", type=int, default=4000, help="of each set, at most")
    parser.add_argument(
        "--max-tokens", type=int, default=64, help="of a text; fewer than the recipe's, for the time"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/adapt"))
    arguments = parser.parse_args()
    connect()
    adapting = Adapting(arguments)
    for stage in PLACES:
        adapting.find_steps(stage)
    pipeline = adapting.pipeline()
    pipeline.make()
    peer = arguments.out / "sentence-transformers"
    trained: dict[str, Any] = {}
    if not Folder.at(str(peer)).files(".safetensors"):
        seconds = 60 * arguments.minutes * SHARES["st"]
        trained = sentence_transformers(pipeline, arguments.backbone, seconds, arguments.out)
    corpus = next(arguments.heldout.glob("*/corpus.parquet"))
    result = summary(pipeline, arguments.out, corpus)
    steps = {**adapting.steps, "st": trained.get("steps")}
    sys.stdout.write(f"{json.dumps({**result, 'steps': steps, 'minutes': arguments.minutes})}\n")


if __name__ == "__main__":
    main()
