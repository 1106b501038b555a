"""Exports a model folder to other runtimes (ONNX, OpenVINO, GGUF), with a proof that the vectors are the same."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from f2llm_ray.base import formatting
from f2llm_ray.base.errors import RecipeError
from f2llm_ray.base.progress import say


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", metavar="FOLDER", type=Path, help="a model folder")
    parser.add_argument("--to", metavar="A,B", default="onnx", help="onnx, openvino, gguf (default: onnx)")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="where the export goes; new or empty")
    parser.add_argument("--check", metavar="FOLDER", type=Path, help="only prove an export again")
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would be written, or why it cannot be"
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Exports, or checks an export."""
    from f2llm_ray.export import export as work

    if arguments.check is not None:
        _show(work.check(arguments.check))
        say(f"{arguments.check}: every proof holds")
        return
    if arguments.model is None or arguments.output is None:
        raise RecipeError("give --model and --output, or --check")
    targets = arguments.to.split(",")
    if arguments.dry_run:
        info = work.admit(arguments.model, arguments.output, targets)
        say(f"would write {info.name} for {', '.join(targets)} to {arguments.output}, and prove it")
        return
    facts = work.export(arguments.model, arguments.output, targets)
    for name, said in facts["files"].items():
        say(f"{formatting.byte_size(said['bytes']):>10}  {name}")
    _show(facts["proofs"])
    say(f"{arguments.output}: every proof holds")


def _show(proofs: dict[str, dict[str, Any]]) -> None:
    for name, said in proofs.items():
        if "least" in said:
            found = f"cosine {said['least']:.6f} at least, {said['mean']:.6f} in the mean"
            say(f"{name}: {found}, of {said['texts']} texts in {said['batches']} batches")
        else:
            say(f"{name}: {said['tensors']} tensors and {said['tokens']} tokens read back")
