"""Computes the vectors of cached teachers for distillations, which else do it by themselves."""

from __future__ import annotations

from f2llm_ray.commands.command_line import stage_command
from f2llm_ray.pipeline import jobs

parser, run = stage_command(jobs.TEACH, __doc__ or "")
