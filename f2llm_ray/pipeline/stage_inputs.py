"""What stages read from outside the run: found, known by content, and remembered where it is gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from f2llm_ray.base.errors import DataError
from f2llm_ray.base.progress import say
from f2llm_ray.base.section import Section
from f2llm_ray.run.inputs import InputFile, InputIndex, KnownInput
from f2llm_ray.run.root import Run

Found = dict[str, tuple[KnownInput, ...]]


@dataclass(frozen=True)
class Sought:
    """Something that a stage reads."""

    place: Any
    """What the recipe says of where it is, as JSON values."""
    files: Callable[[], list[InputFile]]
    """Lists its files, in the order they are read."""


def places(sought: Mapping[str, Sought]) -> dict[str, Any]:
    """Where the inputs of a stage are looked for, by what they are to it."""
    return {role: entry.place for role, entry in sought.items()}


def place_of(section: Section) -> dict[str, Any]:
    """All settings of a section, places included."""
    return section.identity(lambda _: True)


class StageInputs:
    """Finds the inputs of a run's stages; its finished stages say what they were made of."""

    def __init__(self, run: Run) -> None:
        self.run, self.index = run, InputIndex(run.root)

    def find(self, stage: str, sought: Mapping[str, Sought]) -> Found:
        """The inputs of a stage by what they are to it.

        Where files are gone, those that a finished stage of the name was made of, from the same places, stand for
        them: a run goes on without its raw data.

        Raises:
            DataError: a file is not there, and no such stage is finished.
        """
        return {role: self._one(stage, role, entry) for role, entry in sought.items()}

    def _one(self, stage: str, role: str, sought: Sought) -> tuple[KnownInput, ...]:
        try:
            return self.index.known(sought.files())
        except DataError as error:
            for manifest in self.run.manifests(stage):
                if manifest.get("places", {}).get(role) == sought.place:
                    say(f"{error}; {stage}-{manifest['hash']} was made of it before and is used")
                    return tuple(KnownInput(**entry) for entry in manifest["inputs"][role])
            raise
