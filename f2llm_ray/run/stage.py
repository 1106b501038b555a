"""A stage: what it is made of, the hash that says whether it must run again, and why it does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import Inputs, KnownInput, differences, digests

Facts = dict[str, Any]
"""What a stage counted and measured, as JSON values."""


def _nothing(_: Folder) -> Facts:
    return {}


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One stage of a run: its folder is named after what goes into it, so that equal work is never done twice."""

    name: str
    """As in its folder and in the report."""
    job: str
    """The job that makes it, such as "train": `f2llm train`, or jobs/train.py."""
    settings: Mapping[str, Any]
    """The settings that can change its output, as plain JSON values."""
    inputs: Inputs = field(default_factory=dict)
    """What it reads from outside the run."""
    places: Mapping[str, Any] = field(default_factory=dict)
    """Where the recipe says that the inputs are, as JSON values."""
    parents: Mapping[str, Stage] = field(default_factory=dict)
    """The stages whose output it reads, by what they are to it, such as "student" or "teacher"."""
    needs: tuple[Stage, ...] = ()
    """Further stages that must be finished before, whose content is among the settings already."""
    implied: bool = False
    """It is made as soon as another stage needs it, and not only by its own job."""
    work: Callable[[Folder], Facts] = _nothing
    """Fills the stage's folder and returns facts for the manifest."""
    accept: Callable[[Facts], None] | None = None
    """Raises where a finished stage, by its manifest, cannot stand for what the recipe asks now."""

    @cached_property
    def hash(self) -> str:
        """8 hex digits over name, settings, contents of inputs, and parents."""
        content = [
            self.name,
            self.settings,
            digests(self.inputs),
            {role: parent.hash for role, parent in self.parents.items()},
        ]
        return short_hash(content)

    @property
    def folder_name(self) -> str:
        """Folder of the stage below the root."""
        return f"{self.name}-{self.hash}"

    def before(self) -> Iterator[Stage]:
        """All stages that must be finished before, each before those that need it."""
        seen: set[str] = set()
        for stage in (*self.needs, *self.parents.values()):
            for found in (*stage.before(), stage):
                if found.folder_name not in seen:
                    seen.add(found.folder_name)
                    yield found


def short_hash(content: Any) -> str:
    """8 hex digits of JSON values; the order of keys does not count."""
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def changes(manifest: Facts, stage: Stage) -> list[str]:
    """Why a finished stage, by its manifest, is another one now, in short phrases."""
    before = {
        name: [KnownInput(**entry) for entry in entries] for name, entries in manifest.get("inputs", {}).items()
    }
    found = differences(before, stage.inputs)
    found += _setting_changes(manifest["settings"], json.loads(json.dumps(stage.settings)))
    known = manifest.get("parents", {})
    found += [
        f"{parent.name} is another one"
        for role, parent in stage.parents.items()
        if known.get(role) != parent.folder_name
    ]
    return found


def _setting_changes(old: Any, new: Any, place: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in dict.fromkeys([*old, *new]):
            inner = f"{place}.{key}" if place else str(key)
            found += _setting_changes(old.get(key), new.get(key), inner)
        return found
    return [] if old == new else [f"{place} {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
