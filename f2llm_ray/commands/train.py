"""Trains the contrastive stages of a recipe, in order; the data must be prepared."""

from __future__ import annotations

import argparse

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.commands.command_line import dry_run, job_parser, pipeline_of
from f2llm_ray.pipeline.jobs import TRAIN


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = job_parser(__doc__ or "")
    parser.add_argument("--stage", help="only this stage (default: all stages of the recipe)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Runs the stages, after making the model they start from.

    Raises:
        RecipeError: the recipe has no such stage.
    """
    pipeline = pipeline_of(arguments)
    stages = [stage.name for stage in pipeline.graph.of_job(TRAIN)]
    if arguments.stage is not None and arguments.stage not in stages:
        raise RecipeError(f"--stage {arguments.stage!r}: the recipe has {stages}")
    if not dry_run(arguments, pipeline, TRAIN):
        pipeline.job(TRAIN, arguments.stage)
