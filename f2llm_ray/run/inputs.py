"""What a stage reads from outside the run, known by content: a file that is copied or touched is the same input.

A local file is hashed: whole up to `WHOLE_BYTES`, beyond that by its ends and its time. What was hashed is kept in
`inputs.json` in the root with size and time of the file, so that an unchanged file costs one look at the disk.
Files in an object store are known by size and time, since hashing would download them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from f2llm_ray.base.errors import DataError, RunError
from f2llm_ray.run.folder import Folder

WHOLE_BYTES = 1 << 30
"""Largest file that is hashed whole; blake2b does about 1 GB/s on one core."""
END_BYTES = 1 << 20
BLOCK_BYTES = 1 << 22
MEMORY = "inputs.json"
MODULES = "modules.json"
"""Names the folders of a sentence-transformers model."""
TOKENIZER_STARTS = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "sentencepiece", "spiece")
TOKENIZER_SUFFIXES = (".json", ".txt", ".model")


@dataclass(frozen=True)
class InputFile:
    """A file that a stage reads, or something else with a version, such as an installed package."""

    uri: str
    size: int | None
    version: str = ""
    """Of what is no file; "" for a file, whose content counts."""


@dataclass(frozen=True)
class KnownInput:
    """An input and what tells its content from any other."""

    uri: str
    size: int | None
    modified: str
    """Time of the file's last change, "" for what is no file."""
    digest: str
    """Of the content; the version of what is no file; size and time where the content was not read."""


Inputs = Mapping[str, Sequence[KnownInput]]
"""What a stage reads, by what it is to the stage, such as "sources.support" or "tokenizer"."""


class InputIndex:
    """Makes inputs known, and remembers in the root, if there is one, what was hashed."""

    def __init__(self, root: Folder | None = None) -> None:
        self.root = root
        known = root is not None and root.exists(MEMORY)
        self._seen: dict[str, dict[str, Any]] = root.read_json(MEMORY) if root is not None and known else {}

    def known(self, files: Iterable[InputFile]) -> tuple[KnownInput, ...]:
        """The inputs with their contents, in the given order.

        Raises:
            DataError: a file is not there.
        """
        found = tuple(self._known(file) for file in files)
        fresh = {entry.uri: asdict(entry) for entry in found if entry.modified}
        if (
            self.root is not None
            and self.root.exists()
            and any(self._seen.get(uri) != entry for uri, entry in fresh.items())
        ):
            self._seen |= fresh
            self.root.write_json(MEMORY, self._seen)
        return found

    def _known(self, file: InputFile) -> KnownInput:
        if file.version:
            return KnownInput(file.uri, file.size, "", file.version)
        folder = Folder.at(file.uri)
        info = folder.filesystem.get_file_info(folder.path)
        if info.type != fs.FileType.File:
            raise DataError(f"{file.uri}: found no such file, expected one that can be read")
        modified = str(info.mtime_ns)
        seen = self._seen.get(file.uri)
        if seen is not None and (seen["size"], seen["modified"]) == (info.size, modified):
            return KnownInput(**seen)
        local = folder.local
        digest = f"{info.size} {modified}" if local is None else _digest(local, info.size, modified)
        return KnownInput(file.uri, info.size, modified, digest)


def files_of(folder: Folder, suffixes: Sequence[str]) -> list[InputFile]:
    """The files directly in a folder that end in one of these, as inputs, sorted by name."""
    names = sorted({name for suffix in suffixes for name in folder.files(suffix)})
    return [InputFile(f"{folder.uri}/{name}", None) for name in names]


def model_inputs(path: str) -> list[InputFile]:
    """What a model or tokenizer is read from: a folder's config, tokenizer and weights, or a name on the hub."""
    if "://" not in path and not Path(path).expanduser().is_dir():
        return [InputFile(f"hub:{path}", None, path)]
    folder = Folder.at(path)
    known = folder.read_json(MODULES) if folder.exists(MODULES) else [{"path": "1_Pooling"}]
    parts = [folder / entry["path"] for entry in known if entry.get("path")]
    return [file for place in (folder, *parts) for file in files_of(place, (".json", ".safetensors"))]


def tokenizer_inputs(path: str) -> list[InputFile]:
    """What a tokenizer is read from: the files of a folder that say how texts are cut, or a name on the hub."""
    found = model_inputs(path)
    if found and found[0].version:
        return found
    files = files_of(Folder.at(path), TOKENIZER_SUFFIXES)
    return [file for file in files if file.uri.rpartition("/")[2].startswith(TOKENIZER_STARTS)]


def prompt_inputs(path: str) -> list[InputFile]:
    """What says which prompts a backbone brings: the files of a folder, or a name on the hub."""
    found = model_inputs(path)
    said = ("modules.json", "config_sentence_transformers.json", "f2llm.json")
    return [file for file in found if file.version or file.uri.rpartition("/")[2] in said]


def digests(inputs: Inputs) -> dict[str, list[str]]:
    """The part of inputs that counts: their contents in order, wherever they lie."""
    return {name: [entry.digest for entry in entries] for name, entries in sorted(inputs.items())}


def differences(before: Inputs, after: Inputs) -> list[str]:
    """What changed between two readings, as one short phrase for each file."""
    found = []
    for name in dict.fromkeys([*before, *after]):
        old = {entry.uri: entry.digest for entry in before.get(name, ())}
        new = {entry.uri: entry.digest for entry in after.get(name, ())}
        if list(old.values()) == list(new.values()):
            continue
        found += [f"{uri} is new" for uri in new if uri not in old]
        found += _without([entry for entry in before.get(name, ()) if entry.uri not in new])
        found += [f"{uri} changed" for uri in new if uri in old and new[uri] != old[uri]]
        if old == new:
            found.append(f"the files of {name} come in another order")
    return found


def _without(entries: Sequence[KnownInput]) -> list[str]:
    """Why inputs of before are not among those of now: a file that is not read any more may still be there."""
    there: dict[str, set[str]] = {}
    for place in {entry.uri.rpartition("/")[0] for entry in entries if entry.modified}:
        with suppress(OSError, RunError):  # of a store that does not answer, or has no such scheme
            there[place] = set(Folder.at(place or "/").files())
    found = []
    for entry in entries:
        place, _, name = entry.uri.rpartition("/")
        gone = entry.modified and place in there and name not in there[place]
        found.append(f"{entry.uri} is gone" if gone else f"{entry.uri} is not read any more")
    return found


def _digest(path: Path, size: int, modified: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
        else:
            digest.update(f"{size} {modified} ".encode() + file.read(END_BYTES))
            file.seek(-END_BYTES, 2)
            digest.update(file.read())
    return digest.hexdigest()
