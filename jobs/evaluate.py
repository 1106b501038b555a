"""Evaluates every finished model of a run, or one model folder, on the recipe's sets."""

from __future__ import annotations

import argparse
import json
import sys

from f2llm_ray.cli import job_parser, main, pipeline_of
from f2llm_ray.evaluate.report import terminal_table
from f2llm_ray.progress import say


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = job_parser(__doc__ or "")
    parser.add_argument(
        "--model", metavar="FOLDER", help="measure this model folder instead, and print its scores as JSON"
    )
    return parser


def evaluate(arguments: argparse.Namespace) -> None:
    """Runs the evaluations."""
    pipeline = pipeline_of(arguments)
    if arguments.model is not None:
        say(json.dumps(pipeline.evaluate_folder(arguments.model), indent=2, ensure_ascii=False))
        return
    pipeline.evaluate()
    say(f"\n{terminal_table(pipeline.report())}\n")


if __name__ == "__main__":
    sys.exit(main(parser(), evaluate))
