"""Mines hard negatives with the model that the recipe names; the data must be prepared."""

from __future__ import annotations

from f2llm_ray.commands.command_line import stage_command
from f2llm_ray.pipeline import jobs

parser, run = stage_command(jobs.MINE, __doc__ or "")
