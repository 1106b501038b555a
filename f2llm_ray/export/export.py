"""Exports of a model folder to other runtimes: made, proved, and checked again later.

An export is a folder of sentence-transformers without its weights, with the files of each runtime beside them. It
is written beside its place and moved there when every proof holds, so that half an export is never found.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from f2llm_ray import __version__
from f2llm_ray.base.checksum import sha256_of
from f2llm_ray.base.errors import RunError
from f2llm_ray.base.optional import require
from f2llm_ray.base.progress import say
from f2llm_ray.engine.runtimes import onnx_file, openvino_file
from f2llm_ray.engine.runtimes.golden import Golden, check_tokens, make_golden
from f2llm_ray.engine.runtimes.own import EXPORT_FILE, model_key
from f2llm_ray.engine.runtimes.source import Source
from f2llm_ray.export import gguf_file
from f2llm_ray.model.checkpoint import CALIBRATION_FILE, OWN, ModelInfo, load_info
from f2llm_ray.model.dense import WEIGHTS_FILE
from f2llm_ray.model.described import CONFIG_FILE, MODULES_FILE
from f2llm_ray.run.folder import Folder

Facts = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A runtime that models are exported to."""

    packages: tuple[str, ...]
    """That its export needs."""
    refuse: Callable[[Path, ModelInfo], None]
    """Raises RunError where it cannot hold a model folder; called before any work."""
    write: Callable[[Source, Path], None]
    """Writes its files into an export's folder."""
    proofs: Callable[[Path, Golden, ModelInfo], Facts]
    """What its proof found, by file; raises RunError where it does not hold."""


def _refuse_none(_: Path, __: ModelInfo) -> None:
    """Every family can be held."""


TARGETS = {
    "onnx": Target(onnx_file.PACKAGES, _refuse_none, onnx_file.write, onnx_file.proofs),
    "openvino": Target(openvino_file.PACKAGES, _refuse_none, openvino_file.write, openvino_file.proofs),
    "gguf": Target(gguf_file.PACKAGES, gguf_file.refuse, gguf_file.write, gguf_file.proofs),
}


def export(model: Path, out: Path, targets: Sequence[str]) -> Facts:
    """Exports a local model folder.

    Args:
        model: a model folder, ours or one of sentence-transformers.
        out: the export's folder; not there yet, or empty.
        targets: of `TARGETS`.

    Returns:
        What `f2llm/export.json` holds: the files with their sizes and sums, and the proof of each.

    Raises:
        RunError: a target is not known or cannot hold the model, the model is damaged, `out` is in use, or a
            proof does not hold; `out` is as it was then.
        DataError: a package is missing.
    """
    info = admit(model, out, targets)
    from f2llm_ray.engine.runtimes.graph import export_backbone

    source = Source(model, info, export_backbone(model))
    golden = make_golden(model, source.backbone)
    with building(out) as folder:
        _copy_texts_side(model, folder)
        golden.save(folder)
        for name in dict.fromkeys(targets):
            say(f"{name}: writing")
            TARGETS[name].write(source, folder)
        facts: Facts = {
            "name": info.name,
            "model": model_key(model, info),
            "made_by": f"f2llm_ray {__version__}",
            "targets": list(dict.fromkeys(targets)),
            "dims": list(info.dims),
            "max_tokens": info.max_tokens,
            "pooling": info.pooling,
        }
        facts["proofs"] = _prove(folder, facts["targets"], golden, info, shown=out)
        facts["files"] = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        Folder.at(str(folder / OWN)).write_json(Path(EXPORT_FILE).name, facts)
    return facts


def admit(model: Path, out: Path, targets: Sequence[str]) -> ModelInfo:
    """Checks what can be checked before any work, and returns the model's facts.

    Raises:
        RunError: a target is not known or cannot hold the model, there is no model, or `out` is in use.
        DataError: a package is missing.
    """
    info = load_info(model)
    for name in targets:
        if name not in TARGETS:
            raise RunError(f"--to: found {name!r}, expected some of {', '.join(TARGETS)}")
        _require(name)
        TARGETS[name].refuse(model, info)
    refuse_used(out)
    return info


def refuse_used(out: Path) -> None:
    """Raises RunError where a folder that is to be written holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: it is there already; expected a folder that is new or empty")


def check(folder: Path) -> Facts:
    """Runs the proofs of an export again, here; the model that it was made from is not needed.

    Returns:
        The proof of each file, as they came out now.

    Raises:
        RunError: it is no export, a file is not the one that was made, or a proof does not hold.
        DataError: a package is missing.
    """
    place = Folder.at(str(folder))
    if not place.exists(EXPORT_FILE):
        raise RunError(f"{folder}: not an export: it has no {EXPORT_FILE}")
    facts = place.read_json(EXPORT_FILE)
    try:
        files = {name: (said["bytes"], said["sha256"]) for name, said in facts["files"].items()}
        targets = [name for name in facts["targets"] if _require(name)]
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder}/{EXPORT_FILE}: not the facts of an export: {error}") from None
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise RunError(f"{path}: it is missing")
        if path.stat().st_size != size:
            raise RunError(f"{path}: found {path.stat().st_size} bytes, expected {size}")
        if sha256_of(path) != digest:
            raise RunError(f"{path}: found another content than the export's (its SHA-256 differs)")
    return _prove(folder, targets, Golden.load(folder), load_info(folder), shown=folder)


def _prove(folder: Path, targets: Sequence[str], golden: Golden, info: ModelInfo, *, shown: Path) -> Facts:
    """The proofs of all targets; errors call the folder `shown`."""
    found: Facts = {}
    try:
        check_tokens(folder, golden, info.max_tokens)
        for name in targets:
            say(f"{name}: proving")
            found |= TARGETS[name].proofs(folder, golden, info)
    except RunError as error:
        raise RunError(str(error).replace(str(folder), str(shown))) from None
    return found


def _require(target: str) -> bool:
    """Raises DataError where a package of a target is missing."""
    for package in TARGETS[target].packages:
        require(package, extra="export")
    return True


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place at the end, or is gone after an error."""
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    except OSError as error:
        raise RunError(f"{out}: cannot be made: {error}") from None
    try:
        yield folder
        folder.chmod(0o755)
        folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copy_texts_side(model: Path, folder: Path) -> None:
    """Copies what loaders read beside weights: config, tokenizer, modules of sentence-transformers, the card."""
    modules = Folder.at(str(model)).read_json(MODULES_FILE)
    places = [entry["path"] for entry in modules if entry.get("path")]
    outside = [place for place in places if Path(place).name != place]
    if outside:
        raise RunError(f"{model / MODULES_FILE}: found path {outside[0]!r}, expected a folder beside it")
    names = [path.name for path in model.glob("*.json") if not path.name.endswith(".index.json")]
    names += [f"{place}/{name}" for place in places for name in (CONFIG_FILE, WEIGHTS_FILE)]
    names += ["README.md", CALIBRATION_FILE]
    for name in (*places, OWN, *names):
        if (model / name).is_dir():
            (folder / name).mkdir()
        elif (model / name).is_file():
            shutil.copyfile(model / name, folder / name)
