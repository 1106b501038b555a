"""What all jobs share on the command line: the same flags, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from f2llm_ray.base.errors import F2LLMError, plain_error

if TYPE_CHECKING:
    from f2llm_ray.pipeline.pipeline import Pipeline
    from f2llm_ray.recipe.recipe import Recipe


def job_parser(description: str, *, run_required: bool = True) -> argparse.ArgumentParser:
    """A parser with the flags that every job has."""
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
    return parser


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the flags ask for.

    Raises:
        RecipeError: it does not fit.
    """
    from f2llm_ray.recipe.files import load_recipe

    return load_recipe(arguments.recipe, arguments.set)


def pipeline_of(arguments: argparse.Namespace) -> Pipeline:
    """The pipeline that the flags ask for, with Ray connected.

    Raises:
        RecipeError: the recipe does not fit; nothing was started then.
    """
    from f2llm_ray.base.session import connect
    from f2llm_ray.pipeline.pipeline import Pipeline

    recipe = recipe_of(arguments)
    pipeline = Pipeline(recipe, arguments.root)
    connect()
    return pipeline


def main(
    parser: argparse.ArgumentParser, job: Callable[[argparse.Namespace], None], argv: Sequence[str] | None = None
) -> int:
    """Runs a job; what a user can mend is told in one message, and the exit code is 1 then.

    Args:
        parser: the job's parser.
        job: its work.
        argv: the command line, sys.argv's when not given.
    """
    arguments = parser.parse_args(argv)
    try:
        job(arguments)
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
