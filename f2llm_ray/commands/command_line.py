"""What all commands share: the same flags, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from f2llm_ray.base.errors import F2LLMError, plain_error
from f2llm_ray.base.progress import say
from f2llm_ray.engine.names import ENGINES

if TYPE_CHECKING:
    from f2llm_ray.pipeline.walk import Pipeline
    from f2llm_ray.recipe.recipe import Recipe

Work = Callable[[argparse.Namespace], None]


def job_parser(description: str, *, run_required: bool = True) -> argparse.ArgumentParser:
    """A parser with the flags that every job of a run has."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Runs on the Ray cluster that RAY_ADDRESS names (auto: this machine's), or starts its own. "
        "Finished stages are skipped; an interrupted one goes on.",
    )
    parser.add_argument(
        "--recipe", required=run_required, metavar="NAME_OR_PATH", help="a built-in recipe's name or a YAML file"
    )
    parser.add_argument(
        "--root", required=run_required, metavar="URI", help="the run's folder: a local path, s3://, gs://, ..."
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="changes one setting of the recipe (may be given several times)",
    )
    parser.add_argument(
        "--rescreen",
        action="store_true",
        help="prepare the data again where evaluation sets came after them, and train on no text of theirs",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only say which stages are there, which would run, and why"
    )
    return parser


def engine_option(parser: argparse.ArgumentParser, default: str) -> None:
    """The flag `--engine` of commands that embed; `default` says what is taken without it."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="what computes the vectors; auto: torch on a GPU, else the fastest installed one that gives torch's "
        f"vectors (default: {default})",
    )


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the flags ask for.

    Raises:
        RecipeError: it does not fit.
    """
    from f2llm_ray.recipe.files import load_recipe

    return load_recipe(arguments.recipe, arguments.set)


def pipeline_of(arguments: argparse.Namespace) -> Pipeline:
    """The pipeline that the flags ask for, with Ray connected unless it is a dry run.

    Raises:
        RecipeError: the recipe does not fit; nothing was started then.
        DataError: a file that the recipe names is not there; nothing was started then.
    """
    from f2llm_ray.base.session import connect
    from f2llm_ray.pipeline.walk import Pipeline

    recipe = recipe_of(arguments)
    pipeline = Pipeline(recipe, arguments.root, rescreen=arguments.rescreen)
    if not arguments.dry_run:
        connect()
    return pipeline


def stage_command(job: str, description: str) -> tuple[Callable[[], argparse.ArgumentParser], Work]:
    """Parser and work of a command that makes the stages which the graph names the job for."""

    def run(arguments: argparse.Namespace) -> None:
        pipeline = pipeline_of(arguments)
        if not dry_run(arguments, pipeline, job):
            pipeline.job(job)

    return partial(job_parser, description), run


def dry_run(arguments: argparse.Namespace, pipeline: Pipeline, job: str | None = None) -> bool:
    """Says which stages of a job, or of all, would run where the flags ask for that; returns whether they do."""
    if not arguments.dry_run:
        return False
    from f2llm_ray.pipeline import dry_run as told

    graph = pipeline.graph
    stages = graph.stages() if job is None else graph.of_job(job)
    notes = told.check_columns(graph, pipeline.run, stages)
    lines = [*told.dry_run(graph, pipeline.run, stages), *notes]
    if job is None:
        lines += ["", *told.overview(graph, pipeline.run), "a dry run: nothing was started"]
    say("\n".join(lines))
    return True


def main(parser: argparse.ArgumentParser, work: Work, argv: Sequence[str] | None = None) -> int:
    """Runs a command; an error that a user can mend is printed in one message, and the exit code is 1 then."""
    arguments = parser.parse_args(argv)
    try:
        work(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to go on\n")
        return 130
    except Exception as error:
        plain: F2LLMError | None = plain_error(error)
        if plain is None:
            raise
        sys.stderr.write(f"error: {plain}\n")
        return 1
    return 0
