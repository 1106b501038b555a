"""Pages of the documentation that are made when it is built: the recipe's keys, the built-in recipes."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from f2llm_ray.base.section import Section
from f2llm_ray.recipe.files import builtin_recipes
from f2llm_ray.recipe.recipe import Recipe

Kind = type[Section]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages (a hook of mkdocs)."""
    files.append(File.generated(config, "recipe.md", content=recipe_page()))
    files.append(File.generated(config, "recipes.md", content=recipes_page()))
    for name, page in (("SECURITY.md", "security.md"), ("CHANGELOG.md", "changes.md")):
        text = (Path(config.config_file_path).parent / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def recipe_page() -> str:
    """Every section of a recipe with its keys, defaults and meaning, read from the models that check recipes."""
    lines = [
        "# Recipe reference",
        "",
        "Every key that a recipe may have. It is made from the models that check recipes, so it cannot lag behind",
        "them. A key without a default must be set. How recipes extend one another is said under",
        "[Concepts](concepts.md#recipes).",
        "",
    ]
    done: set[Kind] = set()
    for place, kind in _sections("", Recipe):
        if kind in done:
            continue
        done.add(kind)
        lines += [f"## `{place}`" if place else "## The whole", "", _paragraph(kind.__doc__ or ""), ""]
        lines += ["| key | type | default | |", "|---|---|---|---|"]
        annotations = _annotations(kind)
        for name, field in kind.model_fields.items():
            lines.append(
                f"| `{name}` | {_cell(annotations.get(name, ''))} | {_default(field)} | {_meaning(field)} |"
            )
        lines.append("")
    return "\n".join(lines)


def recipes_page() -> str:
    """The recipes that come with the package, as they are."""
    lines = [
        "# Built-in recipes",
        "",
        "Each by its name: `--recipe quickstart`. `extends` names the one it changes.",
        "",
    ]
    for name in builtin_recipes():
        text = (resources.files("f2llm_ray.recipe") / "builtin" / f"{name}.yaml").read_text(encoding="utf-8")
        lines += [f"## {name}", "", "```yaml", text.rstrip(), "```", ""]
    return "\n".join(lines)


def _sections(place: str, kind: Kind) -> Iterator[tuple[str, Kind]]:
    """The section and all below it, in the order of their keys."""
    yield place, kind
    for name, field in kind.model_fields.items():
        below = list(_kinds(field.annotation))
        path = f"{place}.{name}" if place else name
        if typing.get_origin(field.annotation) is dict:
            path += ".NAME"
        for part in below:
            yield from _sections(f"{path}{_tag(part)}" if len(below) > 1 else path, part)


def _tag(kind: Kind) -> str:
    """What tells a section from the others that may stand in its place."""
    for key in ("format", "kind"):
        if key in kind.model_fields:
            values = typing.get_args(kind.model_fields[key].annotation)
            return f" ({key}: {' or '.join(map(str, values))})"
    return ""


def _kinds(annotation: Any) -> Iterator[Kind]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, Section):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _kinds(argument)


def _annotations(kind: Kind) -> dict[str, str]:
    """The types of a section's keys as its source writes them, those of its bases first."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, Section) and base is not Section:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(tree, ast.ClassDef)  # noqa: S101 - it is the source of a class
            for node in tree.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found[node.target.id] = ast.unparse(node.annotation)
    return found


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return ""
    if isinstance(value, Section):
        return "its defaults"
    return "unset" if value is None else f"`{value!r}`".replace("|", "\\|")


def _meaning(field: FieldInfo) -> str:
    limits = []
    for limit in field.metadata:
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
            if getattr(limit, name, None) is not None:
                limits.append(f"{sign} {getattr(limit, name)}")
    text = _paragraph(field.description or "")
    return " ".join(part for part in (text, f"({', '.join(limits)})" if limits else "") if part).replace(
        "|", "\\|"
    )


def _cell(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _paragraph(text: str) -> str:
    return " ".join(inspect.cleandoc(text).split())
