"""Prunes models to the shapes in the recipe."""

from __future__ import annotations

from f2llm_ray.commands.command_line import stage_command
from f2llm_ray.pipeline import jobs

parser, run = stage_command(jobs.PRUNE, __doc__ or "")
