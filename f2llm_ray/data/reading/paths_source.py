"""Sources made of files: which files the paths of a recipe stand for, and what is passed over."""

from __future__ import annotations

from abc import abstractmethod

from pydantic import Field, field_validator

from f2llm_ray.base.errors import DataError
from f2llm_ray.base.section import Content
from f2llm_ray.data.reading.base import SourceBase
from f2llm_ray.data.reading.paths import find_files, listed, passed_over
from f2llm_ray.run.inputs import InputFile


class PathsSource(SourceBase):
    """A source that reads files."""

    paths: Content[tuple[str, ...]] = Field(min_length=1)
    """Files, folders or globs (*, [abc], ** over folders), local or any URI that pyarrow or fsspec opens, such as
    s3://bucket/folder or hf://datasets/owner/name/file.parquet (which needs huggingface_hub).
    A folder stands for all the files below it with the format's suffix; hidden ones are left out. Relative paths
    start at the folder that the command runs in, not at the recipe's."""

    @field_validator("paths")
    @classmethod
    def _is_said(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("found '', expected a file, a folder or a glob; the folder of the run is '.'")
        return value

    @property
    @abstractmethod
    def suffixes(self) -> tuple[str, ...]:
        """Endings of the files that a folder stands for."""

    def inputs(self, name: str) -> list[InputFile]:
        """The files in the order of `paths`, each once, sorted within a folder or glob; without those of 0 bytes.

        Raises:
            DataError: a path that matches nothing, or all files are empty.
        """
        found = self._found(name)
        with_rows = [file for file in found if file.size != 0]
        if not with_rows:
            raise DataError(f"source {name!r}: {found[0].uri}: found an empty file, expected rows")
        return with_rows

    def notes(self, name: str) -> list[str]:
        """Empty files, and files of other formats in the folders."""
        empty = [file.uri for file in self._found(name) if file.size == 0]
        other = [f"{path}/{found}" for path in self.paths for found in passed_over(path, self.suffixes)]
        told = ((empty, "empty"), (other, f"passed over, having another ending than {listed(self.suffixes)}"))
        return [f"source {name!r}: {len(some):,} files {what}, such as {some[0]}" for some, what in told if some]

    def _found(self, name: str) -> list[InputFile]:
        found: dict[str, InputFile] = {}
        for path in self.paths:
            files = find_files(path, self.suffixes, f"source {name!r}: {path}").values()
            found |= {file.uri: found.get(file.uri, file) for file in files}
        return list(found.values())
