"""Computes the vectors of cached teachers for distillations, which else do it by themselves."""

from __future__ import annotations

import sys

from f2llm_ray.pipeline.command_line import main, stage_job

if __name__ == "__main__":
    sys.exit(main(*stage_job(__file__, __doc__ or "")))
