"""Which files a path of a recipe stands for, on any file system."""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase

from pyarrow import fs

from f2llm_ray.base.errors import DataError, RunError
from f2llm_ray.run.folder import Folder

# What the libraries below fsspec's file systems raise when a store cannot be reached; it is no OSError.
_HTTP_ERRORS = {"httpx": "HTTPError", "httpx2": "HTTPError", "aiohttp": "ClientError"}


def store_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What opening and reading a file may raise, on a disk and in an object store, for an `except` clause."""
    loaded = [(sys.modules.get(module), name) for module, name in _HTTP_ERRORS.items()]
    return OSError, *more, *(getattr(module, name) for module, name in loaded if module is not None)


def find_files(path: str, suffix: str, place: str) -> list[str]:
    """Lists the files that a path stands for, sorted, as paths or URIs that `Folder.at` opens.

    Raises:
        DataError: nothing matches, a file is empty, or the file system cannot be reached.
    """
    try:
        entries = _entries(path, suffix)
    except store_errors(RunError, ValueError, NotImplementedError) as error:
        raise DataError(f"{place}: {path}: cannot be opened: {error}") from None
    if not entries:
        raise DataError(f"{place}: {path}: found no file, expected a file, a folder with {suffix} files or a glob")
    for uri, size in entries:
        if size == 0:
            raise DataError(f"{place}: {uri}: found an empty file, expected rows")
    return [uri for uri, _ in entries]


def _entries(path: str, suffix: str) -> list[tuple[str, int | None]]:
    """URI and size of each file that a path stands for."""
    folder = Folder.at(path)
    info = folder.filesystem.get_file_info(folder.path)
    if info.type == fs.FileType.File:
        return [(folder.uri, info.size)]
    if info.type == fs.FileType.Directory:
        found = _below(path)
        return [(uri, size) for parts, uri, size in found if parts[-1].endswith(suffix)]
    base, pattern = _split_glob(path)
    return [(uri, size) for parts, uri, size in _below(base) if pattern and _fits(parts, pattern)]


def _below(path: str) -> list[tuple[list[str], str, int | None]]:
    """All files below a folder that are not hidden: path parts relative to it, URI, size."""
    folder = Folder.at(path)
    start, question, options = (folder.uri, "", "") if folder.local is not None else folder.uri.partition("?")
    selector = fs.FileSelector(folder.path, recursive=True, allow_not_found=True)
    found = []
    for entry in folder.filesystem.get_file_info(selector):
        relative = entry.path[len(folder.path) :].strip("/")
        parts = relative.split("/")
        if entry.type == fs.FileType.File and not any(part.startswith(".") for part in parts):
            found.append((parts, f"{start.rstrip('/')}/{relative}{question}{options}", entry.size))
    return sorted(found)


def _split_glob(path: str) -> tuple[str, list[str]]:
    """The folder above the first part with a wildcard, and the parts from there; "?" begins a URI's options."""
    start, question, options = path.partition("?") if "://" in path else (path, "", "")
    parts = start.split("/")
    wild = next((i for i, part in enumerate(parts) if "*" in part or "[" in part), len(parts))
    base = "/".join(parts[:wild]) or ("/" if wild and wild < len(parts) else ".")
    return f"{base}{question}{options}", parts[wild:]


def _fits(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or (bool(parts) and _fits(parts[1:], pattern))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
