"""What every key of a recipe means, read from the sections that check recipes: for `f2llm recipe explain`, docs.

A place is the path of a section, such as "data", "stages.NAME" or "sources.NAME", where NAME is any name. Several
sections may stand at one place, told apart by their `kind` or `format`.
"""

from __future__ import annotations

import difflib
import inspect
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.base.section import Section, effect_of
from f2llm_ray.evaluate.settings import SECTIONS as SETS
from f2llm_ray.recipe.aliases import ALIASES, TOPICS
from f2llm_ray.recipe.recipe import Recipe

NAME = "NAME"
TAGS = ("kind", "format")
"""Keys whose value tells the sections at one place apart."""
TAG_MEANING = "Says which of the sections that may stand here this is."
BOUNDS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
LENGTHS = (("min_length", "at least"), ("max_length", "at most"))
PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "any"}
CLOSEST = 5
ALIKE = 0.65
"""Least likeness, from 0 to 1, of a key that may have been meant."""
PART = 3
"""Least letters of a part of a key by which it is found."""
WIDTH = 100

Kind = type[Section]


@dataclass(frozen=True)
class Place:
    """A section of the recipe and where it stands."""

    path: str
    """"" for the whole recipe."""
    kind: Kind
    tag: str = ""
    """What tells it from the others at its path, such as "kind: distill"; "" where it is alone."""

    @property
    def title(self) -> str:
        """Path and tag."""
        return f"{self.path} ({self.tag})" if self.tag else self.path

    def key(self, name: str) -> str:
        """The path of one of its keys."""
        return f"{self.path}.{name}" if self.path else name


def places() -> list[Place]:
    """All sections of a recipe, each before those inside it, in the order of their keys."""
    return list(dict.fromkeys(_places(Place("", Recipe))))


def sections_at(parts: list[str]) -> list[Place]:
    """The sections that a path leads to, given by its parts; none where it leads to a mapping or a plain value."""
    return [place for place in places() if _fits(place.path, parts)]


def _places(place: Place) -> Iterator[Place]:
    yield place
    for name, field in place.kind.model_fields.items():
        path = place.key(name)
        if typing.get_origin(field.annotation) is dict:
            path += f".{NAME}"
        inner = list(dict.fromkeys(_kinds(field.annotation)))
        for kind in inner:
            yield from _places(Place(path, kind, _tag(kind) if len(inner) > 1 else ""))


def _kinds(annotation: Any) -> Iterator[Kind]:
    """The sections inside an annotation."""
    if typing.get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _kinds(argument)


def _tag(kind: Kind) -> str:
    for key in TAGS:
        if key in kind.model_fields:
            values = typing.get_args(kind.model_fields[key].annotation)
            # Sets on disk are told apart by a table of their own.
            named = values or [name for name, section in SETS.items() if section is kind]
            return f"{key}: {' or '.join(map(str, named))}"
    return ""


# What is said of a key.


def type_text(annotation: Any) -> str:
    """What a value may be, in words."""
    if typing.get_origin(annotation) is None:
        named = "a section" if list(_kinds(annotation)) else getattr(annotation, "__name__", str(annotation))
        return PLAIN.get(annotation, named)
    return _generic_text(typing.get_origin(annotation), typing.get_args(annotation))


def _generic_text(origin: Any, arguments: tuple[Any, ...]) -> str:
    if origin is Literal:
        return " | ".join(map(str, arguments))
    said = [type_text(argument) for argument in arguments[: 1 if origin is typing.Annotated else None]]
    if origin is typing.Annotated:
        return " ".join([*said, *_bounds(arguments[1:])])
    if origin is dict:
        return f"mapping of {said[0]} to {said[1]}"
    if origin in {tuple, list}:
        return f"list of {said[0]}"
    return " | ".join(dict.fromkeys(said))


def default_text(field: FieldInfo) -> str | None:
    """The default of a key; None where it must be set."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return None
    if isinstance(value, Section):
        return "its defaults"
    if value is None:
        return "unset"
    return _yaml(to_jsonable_python(value))


def _yaml(value: Any) -> str:
    """A value in one line."""
    return (
        yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).removesuffix("\n...\n").strip()
    )


def meaning(name: str, field: FieldInfo) -> str:
    """The doc text of a key, in one paragraph; that of the section, where it holds one and has none itself."""
    inner = list(_kinds(field.annotation))
    own = TAG_MEANING if name in TAGS else next((kind.__doc__ for kind in inner), None)
    return paragraph(field.description or own or "")


def bounds_text(field: FieldInfo) -> str:
    """Its bounds, such as "> 0, ≤ 1"; "" without any."""
    return ", ".join(_bounds(field.metadata))


def _bounds(metadata: typing.Iterable[Any]) -> list[str]:
    found = []
    for mark in metadata:
        marks = [mark, *getattr(mark, "metadata", ())]
        for limit in marks:
            found += [f"{sign} {getattr(limit, name)}" for name, sign in BOUNDS if hasattr(limit, name)]
            found += [
                f"{words} {getattr(limit, name)} long"
                for name, words in LENGTHS
                if getattr(limit, name, None) is not None
            ]
    return found


def paragraph(text: str) -> str:
    """A docstring as one line."""
    return " ".join(inspect.cleandoc(text).split())


# What `f2llm recipe explain` says.


def explain(key: str, recipe: Recipe | None = None) -> list[str]:
    """What a key or section means, in lines.

    Args:
        key: a path such as "data.max_tokens" or "stages.stage1.lr", where any name stands for NAME; "" for the
            whole recipe; or a kind of stage or format of source, such as "train", "distill.teacher" or "csv".
        recipe: one whose values are shown beside the defaults.

    Raises:
        RecipeError: no such key; the message names the closest ones.
    """
    parts = key.split(".") if key else []
    sections = _named_sections(parts)
    if sections:
        return _joined(_section_lines(place) for place in sections)
    above = _named_sections(parts[:-1])
    found = [place for place in above if parts[-1] in place.kind.model_fields]
    alias = ALIASES.get(parts[-1])
    target = alias or TOPICS.get(parts[-1])
    if not found and target is not None:
        known = f"{parts[-1]} is {'called' if alias else 'no key; see'} {target.key}" + (" here" if alias else "")
        return [*_wrapped(known + (f": {target.note}" if target.note else "")), "", *explain(target.key, recipe)]
    if not found:
        closest = _closest(key)
        near = f"; closest: {', '.join(closest)}" if closest else ""
        raise RecipeError(f"{key}: no such key of a recipe{near}; `f2llm recipe explain` lists all")
    # The same key of several sections, such as `weight` of all formats, is said once.
    name, said = parts[-1], dict[str, list[Place]]()
    for place in found:
        said.setdefault("\n".join(_key_lines(place, name)), []).append(place)
    several = len(said) > 1
    return _joined(
        [
            first.key(name) + (f" ({first.tag})" if first.tag and several else ""),
            *_key_lines(
                first, name, [line for place in (first, *others) for line in _values(recipe, place, name)]
            ),
        ]
        for first, *others in said.values()
    )


def _named_sections(parts: list[str]) -> list[Place]:
    """The sections that a path leads to, or that its first part names by kind or format."""
    known, found = places(), sections_at(parts)
    if parts and not found:
        tagged = [place for place in known if parts[0] in _tags(place)]
        roots = dict.fromkeys((place.path, place.kind) for place in tagged if place.path.endswith(NAME))
        for path, kind in list(roots)[:1] if len({path for path, _ in roots}) > 1 else roots:
            inner = _places(Place(path, kind, parts[0]))
            found += [place for place in inner if _fits(place.path, [*path.split("."), *parts[1:]])]
    return found


def _fits(path: str, parts: list[str]) -> bool:
    own = path.split(".") if path else []
    return len(own) == len(parts) and all(a in (NAME, b) for a, b in zip(own, parts, strict=True))


def _tags(place: Place) -> list[str]:
    return place.tag.partition(": ")[2].split(" or ") if place.tag else []


def _section_lines(place: Place) -> list[str]:
    lines = [place.title or "A recipe", *_wrapped(paragraph(place.kind.__doc__ or "")), ""]
    fields = place.kind.model_fields
    width = max(map(len, fields)) + 2
    for name, field in fields.items():
        default = default_text(field)
        said = f"{type_text(field.annotation)}; " + ("must be set" if default is None else f"default: {default}")
        lines.append(f"  {name:<{width}}{said}")
    return lines


def _key_lines(place: Place, name: str, values: Sequence[str] = ()) -> list[str]:
    """What is said of a key, but for its path; a recipe's values of it among that."""
    field = place.kind.model_fields[name]
    default, bounds = default_text(field), bounds_text(field)
    lines = _wrapped(meaning(name, field))
    lines.append(f"  type:    {type_text(field.annotation)}")
    lines.append("  must be set" if default is None else f"  default: {default}, where the recipe sets no other")
    lines += values
    if bounds:
        lines.append(f"  bounds:  {bounds}")
    effect = effect_of(field)
    if effect is not None and effect.output:
        lines.append("  another value makes the stage run again, and those after it")
    return [*lines, *_entry_lines(place, name)]


def _values(recipe: Recipe | None, place: Place, name: str) -> Iterator[str]:
    """The values of a key in a recipe, a line for each section of its place that the recipe has."""
    if recipe is None or list(_kinds(place.kind.model_fields[name].annotation)):
        return
    sections: list[tuple[str, Any]] = [("", recipe)]
    for part in place.path.split(".") if place.path else ():
        inner: list[tuple[str, Any]] = []
        for path, value in sections:
            held = value if isinstance(value, Mapping) else dict(value)
            inner += [
                (f"{path}{key}.", each) for key, each in held.items() if part in (NAME, key) and each is not None
            ]
        sections = inner
    for path, section in sections:
        if type(section) is place.kind:
            value = to_jsonable_python(getattr(section, name))
            yield f"  {path}{name} of {recipe.name}: {'unset' if value is None else _yaml(value)}"


def _entry_lines(place: Place, name: str) -> list[str]:
    """Of a key that holds entries with names: which keys an entry takes, with those that must be set marked."""
    path = f"{place.key(name)}.{NAME}"
    kinds = [inner for inner in places() if inner.path == path]
    lines = ["", f"  An entry has a name of your own; `f2llm recipe explain {path}` says what its keys mean."]
    for inner in kinds:
        fields = inner.kind.model_fields
        keys = [key + ("*" if default_text(field) is None else "") for key, field in fields.items()]
        lines += ["", f"  {inner.title}", *(f"  {line}" for line in _wrapped(", ".join(keys)))]
    return [*lines, "", "  * must be set"] if kinds else []


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _joined(parts: typing.Iterable[list[str]]) -> list[str]:
    found: list[str] = []
    for lines in parts:
        found += ["", *lines] if found else lines
    return found


def _closest(key: str) -> list[str]:
    """Keys that may have been meant: those that end the same, or hold the word, then those that read alike."""
    known = list(dict.fromkeys(place.key(name) for place in places() for name in place.kind.model_fields))
    last = key.rpartition(".")[2]
    ends = {path: path.rpartition(".")[2] for path in known}
    same = [path for path, end in ends.items() if end == last]
    same += [path for path, end in ends.items() if len(last) >= PART and last in end]
    known += list(dict.fromkeys(tag for place in places() for tag in _tags(place)))
    alike = difflib.get_close_matches(key, known, n=CLOSEST, cutoff=ALIKE)
    by_end = difflib.get_close_matches(last, sorted(set(ends.values())), n=2, cutoff=ALIKE)
    alike += [path for path, end in ends.items() if end in by_end]
    return list(dict.fromkeys([*same, *alike]))[:CLOSEST]
