"""Prunes a trained stage to the shape in the recipe."""

from __future__ import annotations

import argparse
import sys

from f2llm_ray.pipeline.command_line import job_parser, main, pipeline_of


def prune(arguments: argparse.Namespace) -> None:
    """Runs the stage."""
    pipeline_of(arguments).model("pruned")


if __name__ == "__main__":
    sys.exit(main(job_parser(__doc__ or ""), prune))
