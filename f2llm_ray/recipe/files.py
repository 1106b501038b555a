"""Recipes as files: YAML that may extend another, changes by `key=value`, and errors that name the key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.base.section import Section
from f2llm_ray.recipe.aliases import ALIASES
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.recipe.reference import sections_at
from f2llm_ray.recipe.strict_yaml import read_yaml
from f2llm_ray.train.settings import LENGTHS

Settings = dict[str, Any]
NEAR = 3
"""Keys that an unknown one is said to be like."""
STAGE = 2
"""Parts of a path of a stage: `stages` and its name."""
SectionT = TypeVar("SectionT", bound=Section)


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("f2llm_ray.recipe") / "builtin"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def summary(name: str) -> str:
    """What a built-in recipe is, in a line: the first one of its file."""
    text = (resources.files("f2llm_ray.recipe") / "builtin" / f"{name}.yaml").read_text(encoding="utf-8")
    return text.partition("\n")[0].removeprefix("# ")


def load_recipe(
    recipe: str | Mapping[str, Any], overrides: Sequence[str] = (), changes: Mapping[str, Any] | None = None
) -> Recipe:
    """Reads a recipe by built-in name or path, follows `extends`, applies `key=value` overrides, validates.

    In place of a name or path it may be the settings themselves, as a YAML file has them. Changes are laid over it
    last, as over a recipe that is extended.

    Raises:
        RecipeError: unreadable file, unknown key or value (with the place and what is allowed), or an
            impossible combination.
    """
    where = recipe if isinstance(recipe, str) else str(recipe.get("name", "recipe"))
    return parse(Recipe, resolved(recipe, overrides, changes), where)


def resolved(
    recipe: str | Mapping[str, Any], overrides: Sequence[str] = (), changes: Mapping[str, Any] | None = None
) -> Settings:
    """The settings of a recipe with all that it extends, overrides and changes applied; not validated.

    Raises:
        RecipeError: unreadable file, or an override that is none.
    """
    settings = _each_its_own(_read(recipe, ()) if isinstance(recipe, str) else _extended(recipe, ()))
    _apply(settings, [_parsed(override) for override in overrides])
    return _merge(settings, changes or {})


def _each_its_own(value: Any) -> Any:
    """A copy with no two mappings one object, as a YAML anchor makes them: a change of one is of one place."""
    if isinstance(value, dict):
        return {key: _each_its_own(inner) for key, inner in value.items()}
    return [_each_its_own(inner) for inner in value] if isinstance(value, list) else value


def parse(section: type[SectionT], settings: Mapping[str, Any], where: str) -> SectionT:
    """Validates settings, with every problem on a line of its own.

    Raises:
        RecipeError: the settings do not fit.
    """
    try:
        return section.model_validate(settings)
    except ValidationError as error:
        lines = [_describe(section, details) for details in error.errors()]
        raise RecipeError(f"{where}: " + "\n  ".join(["the recipe does not fit:", *lines])) from None


def _read(name_or_path: str, seen: tuple[Path, ...]) -> Settings:
    path = _locate(name_or_path, seen[-1].parent if seen else None)
    if path in seen:
        raise RecipeError(f"{path}: extends itself through {' -> '.join(map(str, seen))}")
    try:
        text = path.read_text(encoding="utf-8")
        settings = read_yaml(text)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise RecipeError(f"{path}: found {type(settings).__name__}, expected a mapping of settings")
    return _extended(settings, (*seen, path))


def _extended(settings: Mapping[str, Any], seen: tuple[Path, ...]) -> Settings:
    """Settings laid over the recipe that they extend, if they extend one."""
    base = settings.get("extends")
    own = {key: value for key, value in settings.items() if key != "extends"}
    return own if base is None else _merge(_read(str(base), seen), own)


def _locate(name_or_path: str, beside: Path | None) -> Path:
    candidates = [Path(name_or_path)] if beside is None else [beside / name_or_path, Path(name_or_path)]
    candidates.append(Path(str(resources.files("f2llm_ray.recipe"))) / "builtin" / f"{name_or_path}.yaml")
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    raise RecipeError(
        f"recipe {name_or_path!r}: no such file, and not one of the built-in recipes {builtin_recipes()}"
    )


def _merge(base: Settings, changes: Mapping[str, Any], path: tuple[str, ...] = ()) -> Settings:
    """Lays changes over a base: mappings merge key by key, everything else is replaced; null removes a key.

    How long a stage is can be said in several ways, and what a backbone is too: the way that the changes take
    replaces those of the base.
    """
    merged = dict(base)
    for key in _replaced(path, base, [key for key, value in changes.items() if value is not None]):
        merged.pop(key, None)
    for key, value in changes.items():
        old = merged.get(key)
        if value is None and (key in merged or _known(path, key)):
            merged.pop(key, None)
        elif isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _merge(old, value, (*path, key))
        else:
            merged[key] = value  # a null of no known key too, for the validation to refuse it
    return merged


def _replaced(path: tuple[str, ...], base: Settings, changed: Sequence[str]) -> list[str]:
    """Settings of a section that mean nothing any more once others of it are changed."""
    if path == ("backbone",):
        # A checkpoint in place of a random model, or the other way round, has a pooling of its own too.
        other = {"path": "shape", "shape": "path"}
        if any(key in changed and base.get(other[key]) is not None for key in other):
            return [key for key in ("path", "shape", "embeddings_from", "pooling") if key not in changed]
        return []
    is_stage = path == ("distill",) or (len(path) == STAGE and path[0] == "stages")
    new = [key for key in LENGTHS if key in changed]
    return [key for key in LENGTHS if key not in new] if is_stage and new else []


def _known(path: tuple[str, ...], key: str) -> bool:
    """Whether a key may stand at a path; any name may where names of one's own stand."""
    sections = sections_at(list(map(str, path)))
    return not sections or any(key in place.kind.model_fields for place in sections)


@dataclass(frozen=True)
class _Override:
    """One `a.b=value`."""

    said: str
    path: tuple[str, ...]
    key: str
    value: Any


def _parsed(override: str) -> _Override:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {override!r}: expected a.b=value")
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not valid YAML: {error}") from None
    return _Override(override, tuple(parts[:-1]), parts[-1], value)


def _apply(settings: Settings, overrides: Sequence[_Override]) -> None:
    """Overrides are one layer: of two that say how long a stage is, none replaces the other."""
    for path in dict.fromkeys(override.path for override in overrides):
        changed = [each.key for each in overrides if each.path == path and each.value is not None]
        section = _section_of(settings, path)
        for key in _replaced(path, section, changed):
            section.pop(key, None)
    for override in overrides:
        place = settings
        for depth, part in enumerate(override.path):
            if depth == 1 and override.path[0] == "stages" and part not in place:
                raise RecipeError(f"--set {override.said!r}: {_no_stage(part, list(place))}")
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise RecipeError(f"--set {override.said!r}: {part!r} holds a single value, not further keys")
        place[override.key] = override.value


def _section_of(settings: Settings, path: tuple[str, ...]) -> Settings:
    """What stands at a path; an empty one where nothing does."""
    place: Any = settings
    for part in path:
        place = place.get(part, {}) if isinstance(place, dict) else {}
    return place if isinstance(place, dict) else {}


def _no_stage(name: str, stages: list[str]) -> str:
    meant = _did_you_mean(difflib.get_close_matches(name, stages, n=1))
    there = f"the stages are {', '.join(stages)}" if stages else "there are no stages"
    return f"no stage is called {name}{meant}; {there}; stages.{name}={{...}} adds one"


def _did_you_mean(near: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _describe(section: type[Section], details: Any) -> str:
    # The classes of a union are steps of pydantic's path, but no keys of the recipe.
    tags = {kind.__name__ for kind in sections_of(section)}
    where = ".".join(str(part) for part in details["loc"] if part not in tags)
    if details["type"] == "extra_forbidden":
        return f"{where}: unknown key" + _meant(where, _allowed(section, details["loc"][:-1]))
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] in {"missing", "value_error"}:
        return f"{where}: {message}" if where else message
    return f"{where}: {message}; found {details['input']!r}{_quotes(details)}"


def _quotes(details: Any) -> str:
    """What to do about text that YAML took for something else, such as the language `no`."""
    found = details["input"]
    if details["type"] != "string_type" or not isinstance(found, bool | int | float):
        return ""
    if isinstance(found, bool):
        return "; YAML reads no, off, yes and on as false and true where they stand without quotes"
    return f'; write it in quotes, "{found}"'


def _meant(where: str, allowed: Sequence[str]) -> str:
    """What an unknown key may have meant, by other libraries' names or by how it reads; and where all keys are."""
    place, _, key = where.rpartition(".")
    alias = ALIASES.get(key)
    near = difflib.get_close_matches(key, allowed, n=NEAR, cutoff=0.6)
    if alias is not None:
        last = alias.key.rpartition(".")[2]
        meant = last if last in allowed else alias.key
        hint = f"; did you mean {meant}" + (f" ({alias.note})?" if alias.note else "?")
    else:
        hint = _did_you_mean(near)
    return f"{hint}; `f2llm recipe explain{' ' if place else ''}{place}` lists all"


def _allowed(section: type[Section], path: Sequence[str | int]) -> list[str]:
    """Keys known at a path of an error; names of a mapping and tags of a union are steps of that path too."""
    kinds = [section]
    for part in map(str, path):
        below = [leaf for kind in kinds for leaf in _leaves(kind.model_fields.get(part))]
        tagged = [
            kind
            for kind in kinds
            if part in (kind.__name__, getattr(kind.model_fields.get("format"), "default", None))
        ]
        kinds = below or tagged or kinds
    return sorted({name for kind in kinds for name in kind.model_fields})


def sections_of(field: Any) -> set[type[Section]]:
    """A section, or those inside a field or annotation such as dict[str, A | B], and all sections inside them."""
    own = set(_leaves(field))
    inner = {leaf for section in own for entry in section.model_fields.values() for leaf in _leaves(entry)}
    return own.union(*map(sections_of, inner))


def _leaves(annotation: Any) -> list[type[Section]]:
    """The sections inside a field or annotation such as dict[str, A | B]."""
    annotation = getattr(annotation, "annotation", annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [leaf for argument in getattr(annotation, "__args__", ()) for leaf in _leaves(argument)]
