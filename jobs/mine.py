"""Mines hard negatives with the model that the recipe names; the data must be prepared."""

from __future__ import annotations

import argparse
import sys

from f2llm_ray.pipeline.command_line import job_parser, main, pipeline_of


def mine(arguments: argparse.Namespace) -> None:
    """Runs the stage."""
    pipeline_of(arguments).mine()


if __name__ == "__main__":
    sys.exit(main(job_parser(__doc__ or ""), mine))
