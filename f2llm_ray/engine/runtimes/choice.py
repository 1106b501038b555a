"""Which engine computes the forward pass of a model folder: the one asked for, or the fastest that holds."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from f2llm_ray.base.errors import F2LLMError, RunError
from f2llm_ray.base.formatting import byte_size
from f2llm_ray.base.progress import say
from f2llm_ray.engine.names import EngineName, GraphName
from f2llm_ray.engine.runtimes import own, store
from f2llm_ray.engine.runtimes.golden import Golden
from f2llm_ray.engine.runtimes.graph_forward import GraphForward
from f2llm_ray.engine.runtimes.memory import free_memory
from f2llm_ray.engine.runtimes.onnx_file import ONE_FILE
from f2llm_ray.engine.runtimes.pace import cpu_name, pace
from f2llm_ray.engine.runtimes.runtimes import RUNTIMES, installed, need
from f2llm_ray.model.checkpoint import ModelInfo, float_bytes, has_dense, has_weights
from f2llm_ray.model.int8 import is_quantized
from f2llm_ray.run.folder import Folder

MAPPED = "a Dense module follows its pooling, which torch runs"
COPIES = 4
"""Copies of the weights in memory at the peak of making the files."""


class Choice(NamedTuple):
    """What was chosen."""

    graph: GraphForward | None
    """None for torch."""
    reason: str = ""
    """Why torch."""


def choose(folder: Path, info: ModelInfo, engine: EngineName, tokens_per_pass: int, *, make: bool) -> Choice:
    """Opens what computes the forward pass; files that a runtime needs are made where there are none.

    Args:
        folder: a local model folder.
        info: its facts.
        engine: what is asked for. With `auto`, what does not hold is passed over, and the reason is in the choice.
        tokens_per_pass: most tokens of a pass.
        make: whether `auto` makes files; else it takes those that are there.

    Raises:
        RunError: the engine that is asked for cannot run the model, or the files in its folder are damaged.
        DataError: a package of it is missing.
    """
    if engine == "torch":
        return Choice(None)
    if has_dense(Folder.at(str(folder))):
        if engine == "auto" and has_weights(folder):
            return Choice(None, MAPPED)
        raise RunError(f"{folder}: {MAPPED}")
    if engine != "auto":
        need(RUNTIMES[engine].package)
        return Choice(_asked_for(folder, info, engine, tokens_per_pass))
    if torch.cuda.is_available() and not is_quantized(folder):
        return Choice(None, "on a GPU")
    try:
        return _fastest(folder, info, tokens_per_pass, make=make)
    except F2LLMError as error:
        if not has_weights(folder):
            raise
        return Choice(None, str(error))


def _asked_for(folder: Path, info: ModelInfo, name: GraphName, tokens_per_pass: int) -> GraphForward:
    if own.has(folder, info, name):
        return own.opened(folder, info, name, tokens_per_pass)
    place = store.place_of(folder, info)
    facts = store.entry(place, folder, info, [name], torch.get_num_threads())
    if name not in store.proven(facts):
        raise RunError(facts["runtimes"][name]["refused"])
    return _kept(place, facts, folder, info, name, tokens_per_pass)


def _fastest(folder: Path, info: ModelInfo, tokens_per_pass: int, *, make: bool) -> Choice:
    """The fastest of the installed runtimes whose proof holds; torch where it is faster than they are."""
    there = installed()
    if not there:
        return Choice(None, "neither openvino nor onnxruntime is installed")
    in_folder = [name for name in there if own.has(folder, info, name)]
    if in_folder:
        graphs: dict[GraphName, GraphForward] = {
            name: own.opened(folder, info, name, tokens_per_pass) for name in in_folder
        }
        seconds = pace(graphs, Golden.load(folder)) if len(graphs) > 1 else dict.fromkeys(graphs, 0.0)
        return Choice(graphs[min(graphs, key=seconds.__getitem__)])
    if make:
        _refuse_large(folder)
    place = store.place_of(folder, info)
    if not make:
        if not store.there(place):
            return Choice(None, "no files for other engines were made of it yet")
        _refuse_large(folder)
    facts = store.entry(place, folder, info, there, torch.get_num_threads())
    proven = [name for name in store.proven(facts) if name in there]
    seconds = facts["pace"][cpu_name()]
    if not proven:
        return Choice(None, "; ".join(facts["runtimes"][name]["refused"] for name in there))
    fastest = min(proven, key=seconds.__getitem__)
    if seconds["torch"] < seconds[fastest]:
        return Choice(None, "the fastest on this machine")
    return Choice(_kept(place, facts, folder, info, fastest, tokens_per_pass))


def _kept(
    place: Path, facts: store.Facts, folder: Path, info: ModelInfo, name: GraphName, tokens_per_pass: int
) -> GraphForward:
    """Opens a file of the cache; one that is damaged is made again, once."""
    try:
        return own.open_checked(place, facts["files"], info, name, tokens_per_pass)
    except RunError as error:
        say(f"{error}; made again")
    store.forget(place)
    made = store.entry(place, folder, info, list(facts["runtimes"]), torch.get_num_threads())
    return own.open_checked(place, made["files"], info, name, tokens_per_pass)


def _refuse_large(folder: Path) -> None:
    """Raises RunError where making the files would take much time or more memory than is free.

    Int8 weights pass: they are refused later, with their own reason.
    """
    if is_quantized(folder):
        return
    size = float_bytes(folder)
    if size > ONE_FILE:
        raise RunError(
            f"its weights take {byte_size(size)} in float32, and files for other engines are made unasked only up "
            f"to {byte_size(ONE_FILE)}; ask for one by name, or serve an export"
        )
    free = free_memory()
    if free is not None and COPIES * size > free:
        raise RunError(
            f"making files for other engines takes {byte_size(COPIES * size)} of memory, and {byte_size(free)} is "
            "free; serve an export"
        )
