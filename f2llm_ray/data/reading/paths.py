"""Which files a path stands for, on any file system."""

from __future__ import annotations

import re
import sys

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
    left out.

    Returns:
        By name relative to the folder, or to the part of a glob before its first wildcard, sorted by it.

    Raises:
        DataError: nothing matches, or the file system cannot be reached.
    """
    try:
        found = _matching(path, suffixes)
    except store_errors(RunError, ValueError, NotImplementedError) as error:
        raise DataError(f"{place}: cannot be opened: {error}") from None
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
    start, question, options = (folder.uri, "", "") if folder.local is not None else folder.uri.partition("?")
    selector = fs.FileSelector(folder.path, recursive=True, allow_not_found=True)
    found = []
    for entry in folder.filesystem.get_file_info(selector):
        name = entry.path[len(folder.path) :].strip("/")
        if entry.type == fs.FileType.File and not any(part.startswith(".") for part in name.split("/")):
            found.append((name, InputFile(f"{start.rstrip('/')}/{name}{question}{options}", entry.size)))
    return sorted(found, key=lambda entry: entry[0].split("/"))
