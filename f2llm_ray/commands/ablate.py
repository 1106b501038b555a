"""Runs variants of a recipe and compares what they make: ablation.{json,md,html} in the root."""

from __future__ import annotations

import argparse

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.progress import say
from f2llm_ray.commands.command_line import dry_run, job_parser


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = job_parser(__doc__ or "")
    parser.add_argument("--variants", required=True, metavar="FILE", help="a YAML file: variants by name")
    parser.add_argument("--hours", type=float, help="begin no variant after so many hours")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Checks all variants before any work starts, runs them, and prints the table.

    Raises:
        RecipeError: a variant that is no recipe.
        RunError: at the end, if a variant failed.
    """
    from f2llm_ray.base.session import connect
    from f2llm_ray.pipeline.ablate import ablate, load_ablation
    from f2llm_ray.pipeline.walk import Pipeline
    from f2llm_ray.report.ablation import markdown

    ablation = load_ablation(arguments.recipe, arguments.variants, arguments.set)
    if arguments.dry_run:
        for name, recipe in ablation.recipes.items():
            say(f"\nvariant {name}:")
            dry_run(arguments, Pipeline(recipe, arguments.root))
        return
    connect()
    table = ablate(ablation, arguments.root, hours=arguments.hours)
    say(f"\n{markdown(table['rows'])}")
    say(f"table: {arguments.root}/ablation.html")
    failed = [row["name"] for row in table["rows"] if "error" in row]
    if failed:
        raise RunError(f"not finished: {', '.join(failed)}; the table says why, and a second run goes on")
