"""Distils the pruned model from its teacher."""

from __future__ import annotations

import argparse
import sys

from f2llm_ray.pipeline.command_line import job_parser, main, pipeline_of


def distill(arguments: argparse.Namespace) -> None:
    """Runs the stage."""
    pipeline_of(arguments).train("distilled")


if __name__ == "__main__":
    sys.exit(main(job_parser(__doc__ or ""), distill))
