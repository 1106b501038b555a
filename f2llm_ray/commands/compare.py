"""Compares each model with the first one on the recipe's sets, by paired bootstrap; writes compare.json."""

from __future__ import annotations

import argparse

from f2llm_ray.base.progress import say
from f2llm_ray.commands.command_line import job_parser, pipeline_of


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = job_parser(__doc__ or "")
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a finished model of the run by its name, a model folder (ours or of sentence-transformers), or an "
        "OpenAI-compatible endpoint as URL#NAME (its key in OPENAI_API_KEY)",
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Measures what is not measured yet, and compares."""
    from f2llm_ray.evaluate.differences import table
    from f2llm_ray.pipeline.compare import compare, dry_run

    pipeline = pipeline_of(arguments)
    if arguments.dry_run:
        say("\n".join(dry_run(pipeline, arguments.models)))
        return
    rows = compare(pipeline, arguments.models)
    pipeline.run.root.write_json("compare.json", rows)
    say(f"\n{table(rows)}\n")
