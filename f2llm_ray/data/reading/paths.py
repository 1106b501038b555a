"""Which files a path stands for, on any file system."""

from __future__ import annotations

import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from fsspec.utils import glob_translate
from pyarrow import fs

from f2llm_ray.base.errors import DataError, RunError
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import InputFile

# What the libraries below fsspec's file systems raise when a store cannot be reached; it is no OSError.
_HTTP_ERRORS = {"httpx": "HTTPError", "httpx2": "HTTPError", "aiohttp": "ClientError"}


COMPRESSED = (".gz", ".bz2", ".zst", ".xz")
"""Endings after a format's own, by which a text file is known to be compressed."""


def plain_name(name: str) -> str:
    """The name of a file without the ending of its compression; Parquet compresses inside, and has none."""
    bare = name.rpartition(".")[0] if name.endswith(COMPRESSED) else name
    return name if bare.endswith(".parquet") else bare


def store_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What opening and reading a file may raise, on a disk and in an object store, for an `except` clause."""
    loaded = [(sys.modules.get(module), name) for module, name in _HTTP_ERRORS.items()]
    return OSError, *more, *(getattr(module, name) for module, name in loaded if module is not None)


def find_files(path: str, suffixes: tuple[str, ...], place: str) -> dict[str, InputFile]:
    """Finds the files that a path stands for, as paths or URIs that `Folder.at` opens.

    A path is a file, whatever its suffix; a folder, which stands for all files below it with one of the suffixes,
    compressed or not; or a glob (*, [abc], ** over folders). Files and folders whose names begin with a dot are
    left out, and so is what a link leads to a second time.

    Returns:
        By name relative to the folder, or to the part of a glob before its first wildcard, sorted by it.

    Raises:
        DataError: nothing matches, a link leads to nothing, or the file system cannot be reached.
    """
    try:
        found = _matching(path, suffixes)
    except store_errors(RunError, ValueError, NotImplementedError) as error:
        raise DataError(f"{place}: cannot be opened: {error}") from None
    gone = next((file.uri for file in found.values() if file.size is None and Path(file.uri).is_symlink()), None)
    if gone is not None:
        raise DataError(f"{place}: {gone}: found a link that leads to nothing, expected a file")
    if not found:
        expected = f"a file, a folder with {listed(suffixes)} files or a glob"
        raise DataError(f"{place}: found no file, expected {expected}")
    return found


def passed_over(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """The names of the files below a folder that it does not stand for; none where the path is no folder."""
    folder = Folder.at(path)
    if folder.filesystem.get_file_info(folder.path).type != fs.FileType.Directory:
        return []
    return [name for name, _ in _below(path) if not plain_name(name).endswith(suffixes)]


def listed(names: tuple[str, ...]) -> str:
    """The names as a person lists them: "a, b or c"."""
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _matching(path: str, suffixes: tuple[str, ...]) -> dict[str, InputFile]:
    folder = Folder.at(path)
    info = folder.filesystem.get_file_info(folder.path)
    if info.type == fs.FileType.File:
        return {info.base_name: InputFile(folder.uri, info.size)}
    if info.type == fs.FileType.Directory:
        return {name: file for name, file in _below(path) if plain_name(name).endswith(suffixes)}
    start, question, options = path.partition("?") if "://" in path else (path, "", "")  # "?": a URI's options
    parts = start.split("/")
    wild = next((i for i, part in enumerate(parts) if "*" in part or "[" in part), None)
    if wild is None:
        return {}
    base = "/".join(parts[:wild]) or ("/" if wild else ".")
    pattern = re.compile(glob_translate("/".join(parts[wild:])))
    return {name: file for name, file in _below(f"{base}{question}{options}") if pattern.match(name)}


def _below(path: str) -> list[tuple[str, InputFile]]:
    """All files below a folder that are not hidden, by their names relative to it, in the order of folders."""
    folder = Folder.at(path)
    if folder.local is not None:
        local = [
            (path[len(folder.path) :].strip("/"), InputFile(path, size)) for path, size in _local(folder.path)
        ]
        return sorted(local, key=lambda entry: entry[0].split("/"))
    start, question, options = folder.uri.partition("?")
    selector = fs.FileSelector(folder.path, recursive=True, allow_not_found=True)
    entries = []
    for entry in folder.filesystem.get_file_info(selector):
        name = entry.path[len(folder.path) :].strip("/")
        if entry.type == fs.FileType.File and not any(part.startswith(".") for part in name.split("/")):
            entries.append((name, InputFile(f"{start.rstrip('/')}/{name}{question}{options}", entry.size)))
    return sorted(entries, key=lambda entry: entry[0].split("/"))


def _local(top: str) -> Iterator[tuple[str, int | None]]:
    """The files below a local folder with their sizes, each once however many links lead to it.

    A link that leads to nothing has no size. Arrow passes over those, and follows a link to a folder above forty
    times.
    """
    waiting, linked, seen = deque([top]), deque[str](), set[str]()
    while waiting or linked:
        path = waiting.popleft() if waiting else linked.popleft()  # what is there by its own name comes first
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        if not Path(path).is_dir():
            if path != top:
                yield path, Path(real).stat().st_size if Path(real).exists() else None
            continue
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                linked.append(entry.path)
            elif entry.is_dir():
                waiting.append(entry.path)
            elif entry.is_file():
                seen.add(f"{real}/{entry.name}")
                yield entry.path, entry.stat().st_size
