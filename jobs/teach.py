"""Computes the vectors of a cached teacher for the distillation, which else does it by itself."""

from __future__ import annotations

import argparse
import sys

from f2llm_ray.pipeline.command_line import job_parser, main, pipeline_of


def teach(arguments: argparse.Namespace) -> None:
    """Runs the stage."""
    pipeline_of(arguments).teach()


if __name__ == "__main__":
    sys.exit(main(job_parser(__doc__ or ""), teach))
