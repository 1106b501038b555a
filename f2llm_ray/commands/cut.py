"""Cuts a model folder to its first layers, its first dims, or both, which it must have been trained for."""

from __future__ import annotations

import argparse
from pathlib import Path

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.base.progress import say


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="FOLDER", type=Path, help="a model folder")
    parser.add_argument("--layers", type=int, metavar="N", help="how many, one of its exits (default: all)")
    parser.add_argument("--dims", type=int, metavar="N", help="one of its matryoshka dims (default: the largest)")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", type=Path, help="the new model folder; new or empty"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would be written, or why it cannot be"
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Cuts."""
    from f2llm_ray.export import cut as work

    if arguments.layers is None and arguments.dims is None:
        raise RecipeError("give --layers, --dims or both")
    wanted = {"layers": arguments.layers, "dims": arguments.dims}
    if arguments.dry_run:
        info, has = work.admit(arguments.model, arguments.output, **wanted)
        layers, dims = arguments.layers or has, arguments.dims or info.dims[-1]
        say(
            f"would write {layers} of {has} layers and {dims} of {info.dims[-1]} dims of {info.name} to "
            f"{arguments.output}"
        )
        return
    facts = work.cut(arguments.model, arguments.output, **wanted)
    say(
        f"{arguments.output}: {facts['layers']} of {facts['of_layers']} layers and {facts['dims']} of "
        f"{facts['of_dims']} dims of {facts['parent']}, {facts['parameters']:,} parameters"
    )
