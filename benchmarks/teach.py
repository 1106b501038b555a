"""A small decoder from scratch, taught by a ready model, beside the teacher and beside itself without one.

The recipe is `teach`, on those retrieval sources of a corpus folder whose texts are short (one parquet file each,
with the columns query, passage, language, passage_language and task_type), on retrieval sets that it never saw.
`--minutes` are those of the teacher's pass over the texts and of the student's training together: what each takes,
a few steps on a small corpus tell, and so many rows and steps are taken as fit. The student without a teacher has
the same shape, rows and minutes, random embeddings, and the contrastive loss alone. Data steps and evaluation come
on top.

The last line is one JSON object: `share_of_teacher` (the student's nDCG@10 over the teacher's, the worse of the
sets), `over_no_teacher` (over that of the student without one), `mixed_share` (the student's queries against the
teacher's passages, over the teacher's), and what they are made of. Model folders stay in `--out`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.experiment import ndcg, retrieval_sources, train_until
from f2llm_ray.base.progress import say
from f2llm_ray.base.session import connect
from f2llm_ray.evaluate.settings import baseline_name
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.recipe.files import load_recipe
from f2llm_ray.recipe.recipe import Recipe

RECIPE = "teach"
TEACHER_SHARE = 0.3
"""Of the minutes, for the teacher's pass over the texts."""
SHARES = {"vectors": 0.7, "contrast": 0.3}
"""Of the others, for each phase of the student."""
SHORT = 100
"""Characters of a query and its passage together, on average, of the sources that are taken."""
LOOKED_AT = 2_000
"""Rows of a source that tell it."""
PROBE_ROWS, PROBE_STEPS = 400, 12
ALONE = "alone"


def sources_of(corpus: Path, cap: int) -> tuple[dict[str, Any], list[int]]:
    """The sources of short texts, so many rows of each, and how many rows each has."""
    sources, rows = {}, []
    for name, source in retrieval_sources(corpus, cap).items():
        file = pq.ParquetFile(source["paths"][0])
        some = next(file.iter_batches(LOOKED_AT, columns=["query", "passage"]))
        if sum(pc.mean(pc.utf8_length(some[side])).as_py() for side in ("query", "passage")) <= SHORT:
            sources[name] = source
            rows.append(file.metadata.num_rows)
    return sources, rows


class Teaching:
    """The runs of one experiment in one root."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.root = given, str(given.out / "run")

    def changes(self, cap: int, *, measured: bool) -> list[str]:
        """What the recipe is told of teacher, data and sets."""
        given, teacher = self.given, json.dumps(str(self.given.teacher))
        sets = {name: {"folder": str(given.heldout / name), "max_queries": given.queries} for name in given.sets}
        evaluation = {"sets": sets if measured else {}, "baselines": [str(given.teacher)], "divisors": [1]}
        return [
            f"sources={json.dumps(sources_of(given.corpus, cap)[0])}",
            f"evaluation={json.dumps(evaluation)}",
            f"data.max_tokens={given.max_tokens}",
            f"tokenizer.path={teacher}",
        ]

    def taught(self, cap: int, steps: Mapping[str, int], *, measured: bool = True) -> Recipe:
        """The recipe with a teacher."""
        teacher = json.dumps(str(self.given.teacher))
        places = [f"{place}={teacher}" for place in ("backbone.embeddings_from", *map(_teacher_of, SHARES))]
        counts = [f"stages.{stage}.max_steps={count}" for stage, count in steps.items()]
        return load_recipe(RECIPE, [*self.changes(cap, measured=measured), *places, *counts])

    def alone(self, cap: int, steps: int, *, measured: bool = True) -> Recipe:
        """The same student without a teacher: random embeddings, which are trained, and the contrastive loss."""
        stage = self.taught(cap, {}).stages["contrast"].model_dump(mode="json")
        kept = (
            "tasks",
            "instructions",
            "global_batch",
            "negatives",
            "length_window",
            "lr",
            "min_lr",
            "warmup_steps",
        )
        own = {name: stage[name] for name in kept} | {"max_steps": steps, "lr": self.given.alone_lr}
        own |= {"engine": stage["engine"], "checkpoint_every": 1_000_000, "validation_rows": 512}
        without = {"backbone": {"embeddings_from": None}, "stages": {**dict.fromkeys(SHARES), ALONE: own}}
        return load_recipe(RECIPE, self.changes(cap, measured=measured), without)

    def trained(self, recipe: Recipe, stage: str) -> tuple[float, float, dict[str, Any]]:
        """Makes a stage of a recipe: seconds of its training and of its teacher's pass, and the facts of that."""
        pipeline = Pipeline(recipe, self.root)
        seconds = train_until(pipeline, stage)
        manifests = [pipeline.run.manifest(found) for found in pipeline.graph.stages()]
        teaching = [manifest["teaching"] for manifest in manifests if manifest and "teaching" in manifest]
        passes = sum(facts["seconds"]["encode"] for facts in teaching)
        return seconds, passes, teaching[0] if teaching else {}


def _teacher_of(stage: str) -> str:
    return f"stages.{stage}.teacher"


def plan(teaching: Teaching) -> tuple[int, dict[str, int], int]:
    """How many rows of a source, and steps of each stage, fit into the minutes, by a probe of a few steps."""
    given = teaching.given
    probe = dict.fromkeys(SHARES, PROBE_STEPS)
    first, _, facts = teaching.trained(teaching.taught(PROBE_ROWS, probe, measured=False), "vectors")
    second = teaching.trained(teaching.taught(PROBE_ROWS, probe, measured=False), "contrast")[0]
    alone = teaching.trained(teaching.alone(PROBE_ROWS, PROBE_STEPS, measured=False), ALONE)[0]
    seconds = 60 * given.minutes
    texts = TEACHER_SHARE * seconds * facts["encoded_texts"] / facts["seconds"]["encode"]
    rows = sources_of(given.corpus, PROBE_ROWS)[1]
    caps = range(PROBE_ROWS, max(rows) + 1, 100)  # few minutes may not do for more than the probe's
    cap = max((cap for cap in caps if 2 * sum(min(cap, n) for n in rows) <= texts), default=PROBE_ROWS)
    left = (1 - TEACHER_SHARE) * seconds * PROBE_STEPS
    each = {"vectors": first, "contrast": second}
    steps = {stage: max(PROBE_STEPS + 1, round(SHARES[stage] * left / each[stage])) for stage in SHARES}
    without = max(PROBE_STEPS + 1, round(seconds * PROBE_STEPS / alone))
    say(f"{cap:,} rows a source, {steps} steps, {without} without a teacher")
    return cap, steps, without


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="a model folder")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of sources")
    parser.add_argument("--heldout", type=Path, required=True, help="folder of retrieval sets")
    parser.add_argument("--sets", nargs="+", default=["tuxpaint_captions"], help="names of those in it")
    parser.add_argument(
        "--minutes", type=float, default=40, help="of the teacher's pass and the student's training"
    )
    parser.add_argument("--queries", type=int, default=4000, help="of each set, at most")
    parser.add_argument("--max-tokens", type=int, default=48, help="of a text")
    parser.add_argument("--alone-lr", type=float, default=2e-3, help="of the student without a teacher")
    parser.add_argument("--out", type=Path, default=Path("runs/teach"))
    given = parser.parse_args()
    for place in ("teacher", "corpus", "heldout"):
        setattr(given, place, getattr(given, place).resolve())  # workers stand in other folders
    connect()
    teaching = Teaching(given)
    cap, steps, without = plan(teaching)
    recipe, alone = teaching.taught(cap, steps), teaching.alone(cap, without)
    spent = {stage: teaching.trained(recipe, stage)[0] for stage in SHARES}
    passes = teaching.trained(recipe, list(SHARES)[-1])[1]
    spent_alone = teaching.trained(alone, ALONE)[0]
    report, beside = (Pipeline(found, teaching.root).everything() for found in (recipe, alone))
    student = next(model for model in report["models"] if model["name"] == "contrast")
    other = next(model for model in beside["models"] if model["name"] == ALONE)
    name = baseline_name(str(given.teacher))
    teacher = next(entry for entry in report["baselines"] if entry["name"] == name)
    result = {
        "share_of_teacher": min(ndcg(student, of) / ndcg(teacher, of) for of in given.sets),
        "over_no_teacher": min(ndcg(student, of) / ndcg(other, of) for of in given.sets),
        "mixed_share": min(ndcg(student["mixed"], of) / ndcg(teacher, of) for of in given.sets),
        "ndcg@10": {
            **{model["name"]: {of: ndcg(model, of) for of in given.sets} for model in report["models"]},
            "mixed": {of: ndcg(student["mixed"], of) for of in given.sets},
            ALONE: {of: ndcg(other, of) for of in given.sets},
            name: {of: ndcg(teacher, of) for of in given.sets},
        },
        "parameters": student["parameters"],
        "non_embedding_parameters": student["non_embedding_parameters"],
        "seconds": {"teacher": round(passes), **{stage: round(took) for stage, took in spent.items()}},
        "seconds_alone": round(spent_alone),
        "steps": {**steps, ALONE: without},
        "rows_a_source": cap,
        "minutes": given.minutes,
    }
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}
    sys.stdout.write(f"{json.dumps(rounded)}\n")


if __name__ == "__main__":
    main()
