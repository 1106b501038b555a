"""Prepares the data of a recipe: read, clean, decontaminate, dedup, tokenise."""

from __future__ import annotations

from f2llm_ray.commands.command_line import stage_command
from f2llm_ray.pipeline import jobs

parser, run = stage_command(jobs.PREPARE, __doc__ or "")
