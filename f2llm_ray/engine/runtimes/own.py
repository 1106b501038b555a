"""Graph files that lie in a model's own folder: an export of `f2llm export`, used as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from f2llm_ray.base.checksum import sha256_of
from f2llm_ray.base.errors import RunError
from f2llm_ray.base.progress import say
from f2llm_ray.data.tokens.tokenizer import TOKENIZER
from f2llm_ray.engine.names import GraphName
from f2llm_ray.engine.runtimes.golden import Golden
from f2llm_ray.engine.runtimes.graph_forward import GraphForward
from f2llm_ray.engine.runtimes.pace import check, open_forward
from f2llm_ray.engine.runtimes.runtimes import RUNTIMES
from f2llm_ray.model.checkpoint import OWN, ModelInfo, has_weights
from f2llm_ray.model.described import CONFIG_FILE

EXPORT_FILE = f"{OWN}/export.json"
"""What an export says of itself."""
LAYOUT = 1
"""Of graphs: those of another number are made anew."""


def model_key(folder: Path, info: ModelInfo) -> str:
    """A hash of all that a model's graph and golden texts are made of; its name and place do not count."""
    files = [folder / CONFIG_FILE, folder / TOKENIZER, *sorted(folder.glob("*.safetensors"))]
    facts = {**asdict(info), "name": "", "layout": LAYOUT}
    content = {path.name: sha256_of(path) for path in files if path.is_file()}
    return sha256(json.dumps([facts, content], sort_keys=True).encode()).hexdigest()[:32]


def has(folder: Path, info: ModelInfo, name: GraphName) -> bool:
    """Whether a folder holds an export for a runtime, of the weights that lie beside it where there are some.

    Raises:
        RunError: it has a file that says so and cannot be read.
    """
    facts = _facts(folder)
    if RUNTIMES[name].file not in facts.get("files", {}):
        return False
    if has_weights(folder) and facts.get("model") != model_key(folder, info):
        say(f"{folder / RUNTIMES[name].file}: not made from the weights beside it, so it is not used")
        return False
    return True


def opened(folder: Path, info: ModelInfo, name: GraphName, tokens_per_pass: int) -> GraphForward:
    """Opens the file of a runtime in an export; see `open_checked`."""
    return open_checked(folder, _facts(folder)["files"], info, name, tokens_per_pass)


def open_checked(
    folder: Path, files: Mapping[str, Mapping[str, Any]], info: ModelInfo, name: GraphName, tokens_per_pass: int
) -> GraphForward:
    """Opens the file of a runtime and checks its vectors, given what was said of the folder's files.

    Raises:
        RunError: a file is damaged, or its vectors are not those of the golden texts.
    """
    check_files(folder, name, files)
    graph = open_forward(folder, info, name, torch.get_num_threads(), tokens_per_pass)
    check(graph, Golden.load(folder), str(folder / RUNTIMES[name].file))
    return graph


def check_files(folder: Path, name: GraphName, said: Mapping[str, Mapping[str, Any]]) -> None:
    """Compares the files of a runtime with what was said of them when they were made.

    Raises:
        RunError: one is missing or another; the message names it.
    """
    for path, facts in said.items():
        if not belongs(path, name):
            continue
        if not (folder / path).is_file():
            raise RunError(f"{folder / path}: it is missing")
        if (folder / path).stat().st_size != facts["bytes"] or sha256_of(folder / path) != facts["sha256"]:
            raise RunError(f"{folder / path}: found another content than was written (its SHA-256 differs)")


def belongs(path: str, name: GraphName) -> bool:
    """Whether a path in a folder is a file of a runtime: its graph, or the weights beside it."""
    graph = Path(RUNTIMES[name].file)
    return Path(path).parent == graph.parent and Path(path).stem == graph.stem


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / EXPORT_FILE
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: not the facts of an export: {error}") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("files"), dict):
        raise RunError(f"{path}: not the facts of an export: it names no files")
    return facts
