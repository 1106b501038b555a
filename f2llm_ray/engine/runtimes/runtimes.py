"""The runtimes that an engine may use: what each needs, and what its file in a folder is."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Protocol

from f2llm_ray.base.errors import DataError
from f2llm_ray.base.optional import not_installed
from f2llm_ray.engine.runtimes import onnx_file, openvino_file
from f2llm_ray.engine.runtimes.onnx_file import Output

if TYPE_CHECKING:
    from pathlib import Path

    from f2llm_ray.engine.names import GraphName
    from f2llm_ray.engine.runtimes.proof import Run


class Open(Protocol):
    """Opens a file as a runtime runs it."""

    def __call__(self, path: Path, *, threads: int, output: Output) -> Run:
        """Raises RunError where it cannot."""


@dataclass(frozen=True)
class Runtime:
    """One of them."""

    package: str
    """That runs its file; to make the file takes the package onnx as well."""
    file: str
    """In the folder of an export."""
    open: Open

    @property
    def version(self) -> str:
        """Of the package; "" where it is not installed."""
        return _version(self.package)


RUNTIMES: dict[GraphName, Runtime] = {
    "openvino": Runtime("openvino", openvino_file.FILE, openvino_file.open_openvino),
    "onnx": Runtime("onnxruntime", onnx_file.FLOAT_FILE, onnx_file.open_onnx),
}


def installed() -> list[GraphName]:
    """The runtimes whose packages are there."""
    return [name for name, runtime in RUNTIMES.items() if runtime.version]


def need(package: str) -> None:
    """Raises DataError, with the way to get it, where a package is not installed."""
    if not _version(package):
        raise DataError(not_installed(package, extra="export"))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
