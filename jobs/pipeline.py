"""Runs all stages of a recipe: prepare, train, prune, distil, evaluate, report."""

from __future__ import annotations

import argparse
import sys

from f2llm_ray.base.progress import say
from f2llm_ray.pipeline.command_line import dry_run, job_parser, main, pipeline_of
from f2llm_ray.report.terminal import terminal_table


def pipeline(arguments: argparse.Namespace) -> None:
    """Runs the stages and prints the report in short."""
    run = pipeline_of(arguments)
    if dry_run(arguments, run):
        return
    report = run.everything()
    say(f"\n{terminal_table(report)}\n")
    say(f"report: {run.run.root.uri}/report.html")
    say(f"serve:  {report['commands']['serve']}")


if __name__ == "__main__":
    sys.exit(main(job_parser(__doc__ or ""), pipeline))
