"""Graph files of models, made once on each machine and kept in the user's cache: `~/.cache/f2llm_ray/graphs`.

An entry is named after the content of the model that it was made from. It holds the files of each runtime, golden
texts with the model's own vectors, and `graphs.json`: sizes and sums of the files, what was proven with which
version, and how fast each engine was here. It is there whole or not at all. The entries that were not used for the
longest time go when all take more than `MOST_BYTES`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f2llm_ray.base.checksum import sha256_of
from f2llm_ray.base.errors import F2LLMError, RunError
from f2llm_ray.base.formatting import byte_size
from f2llm_ray.base.progress import say
from f2llm_ray.engine.names import GraphName
from f2llm_ray.engine.runtimes import onnx_file, openvino_file
from f2llm_ray.engine.runtimes.golden import Golden, make_golden
from f2llm_ray.engine.runtimes.graph import export_backbone
from f2llm_ray.engine.runtimes.own import belongs, model_key
from f2llm_ray.engine.runtimes.pace import Forward, cpu_name, open_forward, pace
from f2llm_ray.engine.runtimes.proof import FLOAT, prove
from f2llm_ray.engine.runtimes.runtimes import RUNTIMES, need
from f2llm_ray.engine.runtimes.source import Source
from f2llm_ray.engine.torch_forward import CPU_PASS, TorchForward
from f2llm_ray.model.checkpoint import ModelInfo
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FACTS_FILE = "graphs.json"
MOST_BYTES = 10_000_000_000
WRITERS: dict[GraphName, Callable[[Source, Path], None]] = {
    "onnx": lambda source, folder: onnx_file.write_float(source.backbone, source.info.pooling, folder),
    "openvino": openvino_file.write,
}
"""In the order in which they are written: OpenVINO's file is made from the ONNX one."""
Facts = dict[str, Any]


def cache_root() -> Path:
    """Where entries lie; XDG_CACHE_HOME is the system's own way to say where caches go."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "f2llm_ray" / "graphs"


def place_of(folder: Path, info: ModelInfo) -> Path:
    """Where the entry of a model lies, there or not; all of its weights are read for that."""
    return cache_root() / model_key(folder, info)


def entry(place: Path, folder: Path, info: ModelInfo, wanted: Sequence[GraphName], threads: int) -> Facts:
    """The facts of a model's entry for these runtimes, which is made at its place where it is not there.

    Raises:
        RunError: the model cannot be exported, or the cache cannot be written.
        DataError: the package onnx is missing.
    """
    with _locked(place):
        facts = _read(place, wanted)
        if facts is None:
            need("onnx")
            facts = _make(folder, info, wanted, threads, place)
        elif cpu_name() not in facts["pace"]:  # made on another machine
            facts["pace"][cpu_name()] = _pace(place, info, facts, threads, export_backbone(folder))
            _write(place, facts)
        os.utime(place)
    return facts


def there(place: Path) -> bool:
    """Whether an entry lies at a place."""
    return (place / FACTS_FILE).is_file()


def forget(place: Path) -> None:
    """Removes an entry."""
    shutil.rmtree(place, ignore_errors=True)


def proven(facts: Facts) -> list[GraphName]:
    """The runtimes whose files hold in an entry."""
    return [name for name in RUNTIMES if facts["runtimes"].get(name, {}).get("refused") == ""]


def _read(place: Path, wanted: Sequence[GraphName]) -> Facts | None:
    """The facts of an entry that has been made for these runtimes; None where it must be made."""
    path = place / FACTS_FILE
    if not path.is_file():
        return None
    try:
        facts: Facts = json.loads(path.read_text(encoding="utf-8"))
        for name in wanted:
            if facts["runtimes"].get(name, {}).get("version") != RUNTIMES[name].version:
                return None
    except (ValueError, KeyError, TypeError, AttributeError):
        say(f"{path}: damaged; made again")
        return None
    return facts


def _make(folder: Path, info: ModelInfo, wanted: Sequence[GraphName], threads: int, place: Path) -> Facts:
    """Makes an entry whole."""
    started = time.perf_counter()
    say(f"{info.name}: making its files for {' and '.join(wanted)}, once on this machine")
    source = Source(folder, info, export_backbone(folder))
    made = Path(tempfile.mkdtemp(prefix=".making-", dir=place.parent))
    try:
        golden = make_golden(folder, source.backbone)
        golden.save(made)
        runtimes: Facts = {}
        for name, write in WRITERS.items():
            if name in wanted:
                runtimes[name] = {"version": RUNTIMES[name].version, "refused": ""}
                try:
                    write(source, made)
                    runtimes[name]["proof"] = _prove(made, info, name, golden, threads, place)
                except F2LLMError as error:
                    runtimes[name]["refused"] = str(error)
        facts: Facts = {"name": info.name, "runtimes": runtimes}
        facts["files"] = {
            str(path.relative_to(made)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(made.rglob("*"))
            if any(belongs(str(path.relative_to(made)), name) for name in wanted)
        }
        facts["pace"] = {cpu_name(): _pace(made, info, facts, threads, source.backbone)}
        facts["seconds"] = round(time.perf_counter() - started, 1)
        _write(made, facts)
        forget(place)
        made.replace(place)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    size = sum(said["bytes"] for said in facts["files"].values())
    say(f"{info.name}: made in {facts['seconds']} s, {byte_size(size)} in {place}")
    _tidy(place)
    return facts


def _prove(made: Path, info: ModelInfo, name: GraphName, golden: Golden, threads: int, place: Path) -> Facts:
    """The proof of an export, without what an engine does not do: it pads on the right alone."""
    file = RUNTIMES[name].file
    run = RUNTIMES[name].open(made / file, threads=threads, output="sentence_embedding")
    return prove(run, golden, info.dims, FLOAT, str(place / file), sizes=(1, 32), sides=("right",))


def _pace(place: Path, info: ModelInfo, facts: Facts, threads: int, backbone: PreTrainedModel) -> dict[str, float]:
    """Seconds of torch and of each proven runtime (`pace.pace`)."""
    forwards: dict[str, Forward] = {"torch": TorchForward(backbone, info.pooling, CPU_PASS)}
    forwards |= {name: open_forward(place, info, name, threads) for name in proven(facts)}
    return pace(forwards, Golden.load(place))


def _write(place: Path, facts: Facts) -> None:
    Folder.at(str(place)).write_json(FACTS_FILE, facts)


def _tidy(newest: Path) -> None:
    """Removes those that were not used for the longest time; an open one stays readable until it is closed."""
    entries = sorted((path for path in newest.parent.iterdir() if (path / FACTS_FILE).is_file()), key=_used)
    sizes = [sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in entries]
    total = sum(sizes)
    for path, size in zip(entries, sizes, strict=True):
        if total > MOST_BYTES and path != newest:
            forget(path)
            total -= size


def _used(path: Path) -> float:
    return path.stat().st_mtime


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Keeps other processes from making the same entry meanwhile.

    Raises:
        RunError: the cache cannot be written.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = place.with_suffix(".lock").open("w")
    except OSError as error:
        raise RunError(f"{place.parent}: cannot be written: {error}") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
