"""Pages of the documentation that are made when it is built: the recipe's keys, the built-in recipes."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic.fields import FieldInfo

from f2llm_ray.recipe.files import builtin_recipes
from f2llm_ray.recipe.reference import Kind, bounds_text, default_text, meaning, paragraph, places, type_text


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
    for place in places():
        if place.kind in done:
            continue
        done.add(place.kind)
        lines += [
            f"## `{place.title}`" if place.path else "## The whole",
            "",
            paragraph(place.kind.__doc__ or ""),
            "",
        ]
        lines += ["| key | type | default | |", "|---|---|---|---|"]
        for name, field in place.kind.model_fields.items():
            type_ = _cell(type_text(field.annotation))
            lines.append(f"| `{name}` | {type_} | {_default(field)} | {_meaning(name, field)} |")
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


def _default(field: FieldInfo) -> str:
    default = default_text(field)
    return "" if default is None else default if default in {"unset", "its defaults"} else _cell(f"`{default}`")


def _meaning(name: str, field: FieldInfo) -> str:
    bounds = bounds_text(field)
    return _cell(" ".join(part for part in (meaning(name, field), f"({bounds})" if bounds else "") if part))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
