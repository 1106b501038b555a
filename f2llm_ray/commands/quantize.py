"""Makes the int8 copies of models that the recipe names in `quantize`."""

from __future__ import annotations

from f2llm_ray.commands.command_line import stage_command
from f2llm_ray.pipeline import jobs

parser, run = stage_command(jobs.QUANTIZE, __doc__ or "")
