"""Evaluates every finished model of a run, or one model folder, on the recipe's sets or on mteb's tasks."""

from __future__ import annotations

import argparse
import json

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.base.progress import say
from f2llm_ray.commands.command_line import dry_run, job_parser, pipeline_of, recipe_of
from f2llm_ray.pipeline import jobs


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = job_parser(__doc__ or "", run_required=False)
    parser.add_argument(
        "--model", metavar="FOLDER", help="measure this model folder instead, and print its scores as JSON"
    )
    mteb = parser.add_argument_group("mteb's tasks instead of the recipe's sets (extra: mteb)")
    mteb.add_argument("--mteb", nargs="+", metavar="BENCHMARK", help='such as "MTEB(Multilingual, v2)"')
    mteb.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks, of the benchmarks or of all")
    mteb.add_argument("--languages", nargs="+", metavar="ISO639-3", help="only these languages, such as deu fra")
    mteb.add_argument(
        "--output", metavar="FOLDER", help="where mteb's result files go (default: mteb/ in the root)"
    )
    mteb.add_argument(
        "--prompts",
        metavar="TABLE",
        help="instructions by task of a published model, such as f2llm-v2, as the installed mteb has them",
    )
    mteb.add_argument(
        "--workers", type=int, metavar="N", help="actors (default: one per GPU, else one per CPU core)"
    )
    return parser


def on_mteb(arguments: argparse.Namespace) -> None:
    """Runs mteb's tasks that have no result yet."""
    from f2llm_ray.evaluate.mteb_run import find_tasks, run_mteb

    has_run = arguments.recipe is not None and arguments.root is not None
    if not has_run and (arguments.model is None or arguments.output is None):
        raise RecipeError("give --recipe and --root, or --model and --output")
    model = arguments.model or pipeline_of(arguments).served_model().uri
    output = arguments.output or f"{arguments.root}/mteb"
    tasks = find_tasks(arguments.mteb or (), arguments.tasks or (), arguments.languages or ())
    if arguments.dry_run:
        say(f"{output}: would run those without a result of {', '.join(task.metadata.name for task in tasks)}")
        return
    engine = recipe_of(arguments).compute.engine if has_run else "torch"
    scores = run_mteb(model, tasks, output, workers=arguments.workers, prompts=arguments.prompts, engine=engine)
    say(json.dumps({"results": output, "scores": scores}, indent=2))


def run(arguments: argparse.Namespace) -> None:
    """Runs the evaluations."""
    if arguments.mteb or arguments.tasks:
        on_mteb(arguments)
        return
    if arguments.recipe is None or arguments.root is None:
        raise RecipeError("give --recipe and --root")
    from f2llm_ray.report.terminal import terminal_table

    pipeline = pipeline_of(arguments)
    if arguments.model is None:
        if not dry_run(arguments, pipeline, jobs.EVALUATE):
            pipeline.evaluate()
            say(f"\n{terminal_table(pipeline.report())}\n")
    elif arguments.dry_run:
        say(f"{arguments.model}: would be measured on {', '.join(pipeline.graph.sets)}")
    else:
        say(json.dumps(pipeline.evaluate_folder(arguments.model), indent=2, ensure_ascii=False))
