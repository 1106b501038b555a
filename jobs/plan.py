"""Says what a recipe's training will take: memory per GPU by part, hours, cost, and what to change to make it fit.

Starts nothing and downloads nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict, replace
from typing import Any

from f2llm_ray import words
from f2llm_ray.cli import main, recipe_of
from f2llm_ray.model.sizes import non_embedding_parameters, parameters
from f2llm_ray.progress import say
from f2llm_ray.recipe import Recipe
from f2llm_ray.train import plan as plans

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
    parser.add_argument("--stage", help="only this stage (default: all that train; the last is 'distilled')")
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


def stage_numbers(
    recipe: Recipe, name: str, cluster: plans.Cluster, arguments: argparse.Namespace
) -> dict[str, Any]:
    """All numbers of one stage."""
    work = plans.stage_work(recipe, name, cluster.world)
    texts = plans.corpus(recipe, work, rows=arguments.rows, tokens_per_row=arguments.tokens_per_row)
    hours = plans.hours_per_epoch(work, texts, cluster)
    stage = recipe.distill if name == "distilled" else recipe.stages[name]
    price = arguments.price_per_gpu_hour
    text_tokens = texts.tokens_per_row / work.texts_per_row
    return {
        "stage": name,
        "parameters": parameters(work.shape, work.vocabulary),
        "non_embedding_parameters": non_embedding_parameters(work.shape),
        "work": {
            **asdict(work),
            "shape": work.shape.model_dump(),
            "teacher": None if work.teacher is None else work.teacher.model_dump(),
            "most_tokens_per_worker": work.most_tokens_per_worker,
        },
        "tokens_per_step": work.rows_per_step * texts.tokens_per_row,
        "tokens_measured": texts.measured,
        "rows_per_epoch": texts.rows_per_epoch,
        "rows_given": arguments.rows is not None,
        "epochs": stage.epochs if stage is not None else None,
        "forward_flops_per_token": plans.forward_flops_per_token(work.shape, text_tokens),
        "training_flops_per_token": plans.flops_per_token(work, text_tokens),
        "hours_per_epoch": hours,
        "cost_per_epoch": None if hours is None or price is None else hours * cluster.world * price,
        "memory": [
            memory_numbers(replace(each, gradient_checkpointing=checkpointing), cluster)
            for each in plans.variants(work)
            for checkpointing in (False, True)
        ],
        "fits": plans.fits(work, cluster.gpu_memory_bytes),
        "changes": plans.changes(work, cluster.gpu_memory_bytes),
    }


def memory_numbers(work: plans.Work, cluster: plans.Cluster) -> dict[str, Any]:
    """One row of the memory table."""
    parts = plans.memory(work)
    return {
        "zero_stage": work.zero_stage,
        "offload": work.offload,
        "gradient_checkpointing": work.gradient_checkpointing,
        **asdict(parts),
        "total_bytes": parts.total_bytes,
        "host_bytes_per_gpu": plans.host_bytes(work),
        "fits": plans.fits(work, cluster.gpu_memory_bytes),
    }


HEAD = (
    f"{'ZeRO':<14}{'weights':>9}{'grads':>8}{'optim.':>8}{'buffers':>9}{'teacher':>9}"
    f"{'activ.':>10}{'sum':>10}{'ckpt.':>9}{'sum':>9}{'host':>8}  fits"
)


def table(numbers: dict[str, Any]) -> list[str]:
    """Lines on one stage."""
    work, rows = numbers["work"], numbers["memory"]
    bound = "" if numbers["tokens_measured"] else " at most"
    texts = f"{work['rows_per_step'] // work['world']} rows x {work['texts_per_row']} texts"
    precision = "bf16" if work["float_bytes"] == 2 else "fp32"
    outside = numbers["non_embedding_parameters"]
    forward, training = (numbers[f"{kind}_flops_per_token"] / 1e9 for kind in ("forward", "training"))
    head = f"{numbers['stage']}: {numbers['parameters']:,} parameters, {outside:,} without embeddings; {precision}"
    lines = (
        f"a GPU's part of a step: {texts} x {work['longest_text_tokens']:,} tokens at most = "
        f"{work['most_tokens_per_worker']:,}, in passes of {work['tokens_per_pass']:,}\n"
        "GB on a GPU for that most, without and with gradient checkpointing (ckpt.), and on its host; "
        f"{plans.USABLE:.0%} may be filled; > is the recipe's\n{HEAD}"
    ).splitlines()
    tail = (
        f"a step: {numbers['tokens_per_step']:,.0f} tokens{bound}, {training:,.3g} GFLOPs each, {forward:,.3g} of "
        f"them for the model's forward pass\nan epoch: {epoch(numbers, bound)}\n{verdict(numbers)}"
    ).splitlines()
    memory = [memory_line(plain, small, work) for plain, small in zip(rows[::2], rows[1::2], strict=True)]
    return [head, *(f"  {line}" for line in [*lines, *memory, *tail])]


def memory_line(plain: dict[str, Any], small: dict[str, Any], work: dict[str, Any]) -> str:
    """One ZeRO stage, without and with gradient checkpointing."""
    marked = (plain["zero_stage"], plain["offload"]) == (work["zero_stage"], work["offload"])
    name = f"{'>' if marked else ' '} {plain['zero_stage']}{' + offload' if plain['offload'] else ''}"
    cells = [("weights", 9), ("gradients", 8), ("optimizer", 8), ("buffers", 9), ("teacher", 9)]
    line = f"{name:<14}" + "".join(f"{plain[f'{part}_bytes'] / GB:>{width}.1f}" for part, width in cells)
    line += f"{plain['activations_bytes'] / GB:>10,.1f}{plain['total_bytes'] / GB:>10,.1f}"
    line += f"{small['activations_bytes'] / GB:>9,.1f}{small['total_bytes'] / GB:>9,.1f}"
    fits = "yes" if plain["fits"] else "with ckpt." if small["fits"] else "no"
    return f"{line}{plain['host_bytes_per_gpu'] / GB:>8.1f}  {fits}"


def epoch(numbers: dict[str, Any], bound: str) -> str:
    """Hours and cost in words."""
    hours, cost = numbers["hours_per_epoch"], numbers["cost_per_epoch"]
    if hours is None:
        return "unknown, since a source has no cap; give --rows"
    paid = "" if cost is None else f", {cost:,.0f} at that price"
    rows = f"{numbers['rows_per_epoch']:,.0f} rows{'' if numbers['rows_given'] else ' (the caps)'}"
    return f"{rows}, {words.duration(hours * 3600)}{bound}{paid}; times {numbers['epochs']}"


def verdict(numbers: dict[str, Any]) -> str:
    """Whether the recipe's settings fit, and what to change if not."""
    changes = numbers["changes"]
    if numbers["fits"]:
        return "fits"
    if changes is None:
        return "does not fit, and no setting helps: make global_batch, the negatives or data.max_tokens smaller"
    steps = [
        f"{value} GPUs" if name == "world" else f"engine.{name}: {json.dumps(value)}"
        for name, value in changes.items()
    ]
    return f"does not fit; it would with {words.listed(steps)}"


def plan(arguments: argparse.Namespace) -> None:
    """Prints the plan."""
    recipe = recipe_of(arguments)
    cluster = plans.Cluster(
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus or max(recipe.compute.workers // arguments.nodes, 1),
        gpu_memory_bytes=arguments.gpu_memory,
        gpu_flops_per_second=arguments.gpu_tflops * 1e12,
        mfu=arguments.mfu,
    )
    names = plans.training_stages(recipe) if arguments.stage is None else [arguments.stage]
    stages = [stage_numbers(recipe, name, cluster, arguments) for name in names]
    if arguments.json:
        say(json.dumps({"recipe": recipe.name, "cluster": asdict(cluster), "stages": stages}, indent=2))
        return
    where = f"{words.plural(cluster.nodes, 'node')} of {words.plural(cluster.gpus_per_node, 'GPU')}"
    say(
        f"{recipe.name} on {where} of {cluster.gpu_memory_bytes / GB:.1f} GB, at {arguments.mfu:.0%} of "
        f"{arguments.gpu_tflops:g} TFLOP/s; GB are 1e9 bytes"
    )
    for numbers in stages:
        say("\n".join(["", *table(numbers)]))


if __name__ == "__main__":
    sys.exit(main(parser(), plan))
