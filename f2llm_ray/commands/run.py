"""Runs all stages of a recipe: prepare, train, prune, distil, evaluate, report."""

from __future__ import annotations

import argparse

from f2llm_ray.base.progress import say
from f2llm_ray.commands.command_line import dry_run, job_parser, pipeline_of


def parser() -> argparse.ArgumentParser:
    """The command line."""
    return job_parser(__doc__ or "")


def run(arguments: argparse.Namespace) -> None:
    """Runs the stages and prints the report in short."""
    pipeline = pipeline_of(arguments)
    if dry_run(arguments, pipeline):
        return
    from f2llm_ray.report.terminal import terminal_table

    report = pipeline.everything()
    say(f"\n{terminal_table(report)}\n")
    say(f"report: {pipeline.run.root.uri}/report.html")
    say(f"serve:  {report['commands']['serve']}")
