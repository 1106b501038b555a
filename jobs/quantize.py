"""Makes the int8 copies of models that the recipe names in `quantize`."""

from __future__ import annotations

import argparse
import sys

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.pipeline.command_line import job_parser, main, pipeline_of


def quantize(arguments: argparse.Namespace) -> None:
    """Runs the stages.

    Raises:
        RecipeError: the recipe has no `quantize`.
    """
    pipeline = pipeline_of(arguments)
    if pipeline.recipe.quantize is None:
        raise RecipeError(f"recipe {pipeline.recipe.name!r} has no section quantize")
    for name in pipeline.recipe.quantize.models:
        pipeline.model(f"{name}-int8")


if __name__ == "__main__":
    sys.exit(main(job_parser(__doc__ or ""), quantize))
