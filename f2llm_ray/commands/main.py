"""`f2llm`: the list of commands, and the way from a name to its module, which is imported when it is asked for."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from f2llm_ray import __version__
from f2llm_ray.commands import command_line

GROUPS = {
    "Recipes": {
        "recipe": "list, show and explain recipes, and write one for your own files",
        "pairs": "make pairs of passages: a language model writes the queries",
        "plan": "memory, hours and cost of a training, before anything runs",
    },
    "Whole runs": {
        "run": "all stages of a recipe, and the report",
        "ablate": "variants of a recipe, side by side in one table",
        "compare": "models on the recipe's sets, each with the first one",
    },
    "Stages of a run": {
        "prepare": "read, clean, deduplicate and tokenize the data",
        "mine": "find hard negatives",
        "train": "train the contrastive stages",
        "prune": "make smaller models of trained ones",
        "teach": "compute a teacher's vectors for a distillation",
        "distil": "train models towards their teachers' vectors",
        "quantize": "make int8 copies of models",
        "evaluate": "measure models on the recipe's sets or on mteb's tasks",
    },
    "Models": {
        "cut": "keep the first layers and dims of a model that was trained for that",
        "embed": "embed a column of files into shards of vectors",
        "export": "write a model for other runtimes (ONNX, OpenVINO, GGUF), with a proof",
        "serve": "answer OpenAI-compatible requests on this machine",
        "publish": "check a model folder and push it to the Hugging Face hub",
    },
}
COMMANDS = {name: summary for commands in GROUPS.values() for name, summary in commands.items()}
ALIASES = {"distill": "distil"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name, those of the process when unset; returns the exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in {"-h", "--help", ""}:
        (sys.stdout if name else sys.stderr).write(overview())
        return 0 if name else 2
    if name in {"-V", "--version"}:
        sys.stdout.write(f"f2llm {__version__}\n")
        return 0
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
        hint = f"did you mean `f2llm {near[0]}`? " if near else ""
        sys.stderr.write(f"error: {name!r} is no command; {hint}`f2llm --help` lists them\n")
        return 2
    return _run(name, rest, f"f2llm {name}")


def job(name: str) -> int:
    """Runs a command under the name of the script that calls this, with the arguments of the process."""
    return _run(name, sys.argv[1:], None)


def overview() -> str:
    """What `f2llm --help` says."""
    width = max(map(len, COMMANDS)) + 2
    lines = [
        "usage: f2llm COMMAND [FLAGS]",
        "",
        "Train, shrink, evaluate and serve multilingual text-embedding models on Ray.",
    ]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:<{width}}{summary}" for name, summary in commands.items())]
    lines += ["", "f2llm COMMAND --help says what a command takes; f2llm --version which version this is."]
    return "\n".join(lines) + "\n"


def _run(name: str, argv: Sequence[str], prog: str | None) -> int:
    module = import_module(f"f2llm_ray.commands.{name}")
    parser = module.parser()
    if prog is not None:
        parser.prog = prog
    return command_line.main(parser, module.run, argv)
