"""Folders on a local disk or in any object store."""

from __future__ import annotations

import io
import json
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from f2llm_ray.base.errors import RunError


@dataclass(frozen=True)
class Folder:
    """A folder on a local disk or in an object store; paths given to its methods are relative to it."""

    filesystem: fs.FileSystem
    path: str
    """Absolute path within the filesystem."""
    uri: str

    @staticmethod
    def at(uri: str) -> Folder:
        """Opens a local path or a URI (s3://, gs://, any that pyarrow or fsspec knows).

        Raises:
            RunError: an unknown scheme or a store that cannot be reached.
        """
        if "://" not in uri:
            path = str(Path(uri).expanduser().absolute())
            return Folder(fs.LocalFileSystem(), path, path)
        try:
            filesystem, path = fs.FileSystem.from_uri(uri)
        except (ValueError, OSError, NotImplementedError, ImportError):
            filesystem, path = _fsspec(uri)
        local = isinstance(filesystem, fs.LocalFileSystem)
        return Folder(filesystem, path.rstrip("/"), path if local else uri.rstrip("/"))

    @property
    def local(self) -> Path | None:
        """The folder as a local path, or None when it is in an object store."""
        return Path(self.path) if isinstance(self.filesystem, fs.LocalFileSystem) else None

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.filesystem, f"{self.path}/{name}", f"{self.uri}/{name}")

    def exists(self, name: str = "") -> bool:
        """Whether the folder, or a file in it, is there."""
        return bool(self.filesystem.get_file_info(self._at(name)).type != fs.FileType.NotFound)

    def create(self) -> None:
        """Makes the folder and those above it.

        Raises:
            RunError: no permission, or a file stands in the way.
        """
        try:
            self.filesystem.create_dir(self.path, recursive=True)
        except OSError as error:
            raise RunError(f"{self.uri}: cannot be made: {error}") from None

    def clear(self) -> None:
        """Removes what is in the folder, and makes it when it is not there."""
        self.create()
        self.filesystem.delete_dir_contents(self.path, missing_dir_ok=True)

    def files(self, suffix: str = "") -> list[str]:
        """Names of the files directly in the folder that end so, sorted; none where there is no such folder."""
        try:
            entries = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        except NotADirectoryError:
            return []
        return sorted(e.base_name for e in entries if e.type == fs.FileType.File and e.base_name.endswith(suffix))

    def read_bytes(self, name: str) -> bytes:
        """The whole of a small file."""
        with self.filesystem.open_input_stream(self._at(name)) as stream:
            return bytes(stream.read())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes a small file so that it is there whole or not at all."""
        with self.replacing(name) as temporary, self.filesystem.open_output_stream(temporary) as stream:
            stream.write(data)

    def read_json(self, name: str) -> Any:
        """A small JSON file.

        Raises:
            RunError: the file is not there or is not JSON.
        """
        try:
            return json.loads(self.read_bytes(name))
        except FileNotFoundError:
            raise RunError(f"{self.uri}/{name}: no such file") from None
        except ValueError as error:
            raise RunError(f"{self.uri}/{name}: not JSON: {error}") from None

    def write_json(self, name: str, value: Any) -> None:
        """Writes JSON that a person can read, whole or not at all."""
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def write_array(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Writes an .npy file, which is there whole or not at all."""
        data = io.BytesIO()
        np.save(data, array, allow_pickle=False)
        self.write_bytes(name, data.getvalue())

    def read_array(self, name: str) -> np.ndarray[Any, Any]:
        """An .npy file: mapped where the folder is local, else read whole."""
        if self.local is not None:
            return np.load(self.local / name, mmap_mode="r", allow_pickle=False)
        return np.load(io.BytesIO(self.read_bytes(name)), allow_pickle=False)

    def upload(self, source: Path) -> None:
        """Copies a local folder's content into this folder."""
        self.create()
        fs.copy_files(str(source), self.path, destination_filesystem=self.filesystem)

    @contextmanager
    def as_local(self) -> Iterator[Path]:
        """The folder as a local one: itself, or a copy that lives as long as the context."""
        if self.local is not None:
            yield self.local
            return
        with tempfile.TemporaryDirectory(prefix="f2llm-") as copy:
            fs.copy_files(self.path, copy, source_filesystem=self.filesystem)
            yield Path(copy)

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A local folder to write into: the folder itself, or one whose content is uploaded at the end."""
        if self.local is not None:
            self.local.mkdir(parents=True, exist_ok=True)
            yield self.local
            return
        with tempfile.TemporaryDirectory(prefix="f2llm-") as copy:
            yield Path(copy)
            self.upload(Path(copy))

    def write_table(self, name: str, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        """Streams tables into one parquet file, which is there whole or not at all."""
        with (
            self.replacing(name) as temporary,
            pq.ParquetWriter(temporary, schema, filesystem=self.filesystem, compression="zstd") as writer,
        ):
            for table in tables:
                writer.write_table(table)

    @contextmanager
    def replacing(self, name: str) -> Iterator[str]:
        """A path in the filesystem to write a file to; it becomes `name` at the end, or is gone after an error."""
        self.create()
        temporary = self._at(f".{name}.{uuid.uuid4().hex}")
        try:
            yield temporary
        except BaseException:
            if self.filesystem.get_file_info(temporary).type == fs.FileType.File:
                self.filesystem.delete_file(temporary)
            raise
        self.filesystem.move(temporary, self._at(name))

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A parquet file of ours, or some of its columns."""
        return pq.read_table(self._at(name), columns=columns, filesystem=self.filesystem)

    def read_batches(self, name: str, columns: list[str]) -> Iterator[pa.Table]:
        """Some columns of a parquet file of ours, one row group after the other."""
        with self.filesystem.open_input_file(self._at(name)) as stream, pq.ParquetFile(stream) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=columns)

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path


def _fsspec(uri: str) -> tuple[fs.FileSystem, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError, OSError) as error:
        raise RunError(f"{uri}: cannot be opened: {error}") from None
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path
