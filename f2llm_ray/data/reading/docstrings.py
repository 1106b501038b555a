"""Python's standard library: from what a docstring says to the function it describes.

The source is read at run time from the running Python and never imported.
"""

from __future__ import annotations

import ast
import inspect
import platform
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pyarrow as pa

from f2llm_ray.base.errors import DataError
from f2llm_ray.base.section import Output
from f2llm_ray.data.reading.base import BadRow, Piece, SourceBase, rows_table
from f2llm_ray.run.inputs import InputFile

PIECE_FILES = 50
TESTS = frozenset({"test", "tests", "idle_test"})

Function = ast.FunctionDef | ast.AsyncFunctionDef


class DocstringsSource(SourceBase):
    """First paragraph of a docstring to the function's source without its docstring."""

    format: Output[Literal["docstrings"]] = "docstrings"
    language: Output[str | None] = "eng"
    """ISO 639-3 of the docstrings."""
    modules: Output[tuple[str, ...] | None] = None
    """Modules or packages of the standard library, such as "json"; all when unset, tests left out."""

    def inputs(self, name: str) -> list[InputFile]:
        """Python, known by its version."""
        del name
        return [InputFile("python", None, platform.python_version())]

    def pieces(self, name: str) -> list[Piece]:
        """One per 50 files."""
        modules = _library()
        if not modules:
            raise DataError(f"source {name!r}: found no source of the standard library, expected .py files")
        for wanted in self.modules or ():
            if not any(_within(module, wanted) for module in modules):
                raise DataError(f"source {name!r}: no module {wanted!r} with source in the standard library")
        files = [
            file
            for module, file in modules.items()
            if self.modules is None or any(_within(module, wanted) for wanted in self.modules)
        ]
        return [{"files": files[first : first + PIECE_FILES]} for first in range(0, len(files), PIECE_FILES)]

    def read(self, name: str, piece: Piece, bad_row: BadRow) -> Iterator[pa.Table]:
        """Reads a few files; a function without a docstring is no row."""
        del bad_row
        rows = [
            {"language": self.language, "query": said, "passage": code, "passage_language": "code:python"}
            for file in piece["files"]
            for said, code in _described_functions(_source(_folder() / file, f"source {name!r}: {file}"))
        ]
        yield rows_table(rows, source=name, task=self.task)


def _folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _library() -> dict[str, str]:
    """Dotted name to file of each module, sorted by file."""
    root = _folder()
    files = [path.relative_to(root) for path in sorted(_python_files(root))]
    return {".".join(file.with_suffix("").parts).removesuffix(".__init__"): file.as_posix() for file in files}


def _python_files(folder: Path) -> Iterator[Path]:
    """Modules below a folder; folders of tests and those that are no packages (site-packages) left out."""
    for path in folder.iterdir():
        if path.is_dir():
            if path.name.isidentifier() and path.name not in TESTS:
                yield from _python_files(path)
        elif path.suffix == ".py" and path.stem.isidentifier():
            yield path


def _within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def _source(path: Path, place: str) -> str:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"{place}: found a file that cannot be read ({error}), expected Python source") from None


def _described_functions(source: str) -> Iterator[tuple[str, str]]:
    """First paragraph of the docstring, and the source without it, of each function and method."""
    lines = source.split("\n")  # splitlines() would also split at form feeds, which ast does not count
    for function in _functions(ast.parse(source)):
        docstring = ast.get_docstring(function, clean=False)
        paragraph = " ".join(inspect.cleandoc(docstring or "").split("\n\n")[0].split())
        code = _without_docstring(function, lines)
        if paragraph and code is not None:
            yield paragraph, code


def _functions(node: ast.AST) -> Iterator[Function]:
    """Functions of a module and methods of its classes, in order; not those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.stmt):
            yield from _functions(child)


def _without_docstring(function: Function, lines: list[str]) -> str | None:
    """The function's lines less those of its docstring; None where nothing else is there or shares them."""
    docstring, *rest = function.body
    end = docstring.end_lineno
    if not rest or end is None or docstring.lineno == function.lineno or rest[0].lineno <= end:
        return None
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    kept = lines[first - 1 : docstring.lineno - 1] + lines[end : function.end_lineno]
    return textwrap.dedent("\n".join(kept)).strip()
