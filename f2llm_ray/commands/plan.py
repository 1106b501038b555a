"""Says what a recipe's training will take: memory per GPU by part, hours, cost, and what to change to make it fit.

Starts nothing and downloads nothing.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict

from f2llm_ray.base import formatting
from f2llm_ray.base.errors import RecipeError
from f2llm_ray.base.progress import say
from f2llm_ray.commands.command_line import recipe_of

GB = 1e9
UNITS = {"": 1.0, "b": 1.0, "mb": 1e6, "gb": GB, "mib": 2.0**20, "gib": 2.0**30}


def byte_count(text: str) -> float:
    """Bytes of a size such as 80GB or 64GiB."""
    found = re.fullmatch(r"([\d.]+)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number and a unit, such as 80GB or 64GiB")
    return float(found[1]) * UNITS[found[2]]


def at_least_one(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 on")
    return int(text)


def above_zero(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return number


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True, metavar="NAME_OR_PATH", help="a built-in recipe or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="changes one setting")
    parser.add_argument("--stage", help="only this stage (default: all that train)")
    parser.add_argument(
        "--gpus", type=at_least_one, help="GPUs per node (default: compute.workers over the nodes)"
    )
    parser.add_argument("--nodes", type=at_least_one, default=1)
    parser.add_argument("--gpu-memory", type=byte_count, default=80 * GB, metavar="SIZE", help="default: 80GB")
    parser.add_argument(
        "--gpu-tflops", type=above_zero, default=989.0, help="a GPU's dense peak (default: 989, an H100 in bf16)"
    )
    parser.add_argument(
        "--mfu",
        type=above_zero,
        default=0.4,
        help="share of that peak that is reached, with recomputation and teacher counted (default: 0.4)",
    )
    parser.add_argument("--rows", type=at_least_one, help="rows of an epoch (default: the sources' caps)")
    parser.add_argument(
        "--tokens-per-row",
        type=above_zero,
        help="mean tokens of query, passage and drawn negatives together (default: all of the longest length)",
    )
    parser.add_argument("--price-per-gpu-hour", type=above_zero, help="in any currency")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON, with units in their names")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Prints the plan."""
    from f2llm_ray.plan.stage_work import Cluster, corpus_size, stage_work, training_stages
    from f2llm_ray.plan.table import stage_numbers, table, totals

    recipe = recipe_of(arguments)
    if arguments.gpus is None and not recipe.compute.gpus_per_worker:
        raise RecipeError(
            f"{recipe.name} trains on CPU (compute.gpus_per_worker is 0), and this plans for GPUs: --gpus says "
            "how many. On CPU a stage is timed as it starts: stages.NAME.max_minutes says how long it may take"
        )
    cluster = Cluster(
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus or max(recipe.compute.workers // arguments.nodes, 1),
        gpu_memory_bytes=arguments.gpu_memory,
        gpu_flops_per_second=arguments.gpu_tflops * 1e12,
        mfu=arguments.mfu,
        price_per_gpu_hour=arguments.price_per_gpu_hour,
    )
    stages = []
    for name in training_stages(recipe) if arguments.stage is None else [arguments.stage]:
        work = stage_work(recipe, name, cluster.world)
        texts = corpus_size(recipe, work, rows=arguments.rows, tokens_per_row=arguments.tokens_per_row)
        stages.append(stage_numbers(work, texts, cluster))
    if arguments.json:
        say(json.dumps({"recipe": recipe.name, "cluster": asdict(cluster), "stages": stages}, indent=2))
        return
    where = f"{formatting.plural(cluster.nodes, 'node')} of {formatting.plural(cluster.gpus_per_node, 'GPU')}"
    say(
        f"{recipe.name} on {where} of {cluster.gpu_memory_bytes / GB:.1f} GB, at {arguments.mfu:.0%} of "
        f"{arguments.gpu_tflops:g} TFLOP/s; GB are 1e9 bytes, > is what the recipe says"
    )
    for numbers in stages:
        say("\n".join(["", *table(numbers)]))
    say("\n".join(["", *totals(stages, cluster)]))
