"""The base of every typed section of a recipe, and what each setting says about the output of its stage.

Every setting is marked where it is defined, with one of the aliases below. A finished stage is made again when a
setting that can change its output has another value, and never for the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic.fields import FieldInfo

T = TypeVar("T")


@dataclass(frozen=True)
class Effect:
    """Whether another value of a setting can change the output of the stage that it belongs to."""

    output: bool
    only_with: str | None = None
    """Name of a setting of the same section: where that is off, this one changes nothing."""
    batches: bool = False
    """It changes which batches a training sees, and in which order."""


Output = Annotated[T, Effect(output=True)]
"""Another value can change what the stage writes."""
Batches = Annotated[T, Effect(output=True, batches=True)]
"""Another value changes the batches of a training, and so what it writes."""
Neutral = Annotated[T, Effect(output=False)]
"""No value changes what the stage writes: names, licences, pace, memory, bookkeeping.

Settings that change nothing but the order in which numbers are summed, such as the token budget of a forward pass,
count as neutral, as the number of workers does: the result is the same up to rounding."""
Content = Annotated[T, Effect(output=False)]
"""Where something is read from: what is read there counts, by its content, and not how the place is spelled."""


def _name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(f"found {name!r} as name, expected letters a to z, digits, _, . and -")
    return name


Name = Annotated[str, AfterValidator(_name)]
"""What a recipe calls a source, a stage or a set; files and folders are named after it."""


class Section(BaseModel):
    """A frozen part of a recipe; a key it does not know is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def identity(self, counts: Callable[[Effect], bool] = lambda effect: effect.output) -> dict[str, Any]:
        """The settings that can change the output of a stage, those of inner sections included, as JSON values.

        Args:
            counts: which effects are meant; by default all on the output.

        Raises:
            TypeError: a setting is not marked.
        """
        values, found = self.model_dump(mode="json"), {}
        for name, field in type(self).model_fields.items():
            effect = effect_of(field)
            if effect is None:
                found[name] = _inner(getattr(self, name), f"{type(self).__name__}.{name}", counts)
            elif counts(effect) and (effect.only_with is None or getattr(self, effect.only_with)):
                found[name] = values[name]
        return found


def effect_of(field: FieldInfo) -> Effect | None:
    """How a setting is marked; None where it is not, as those that hold further sections."""
    return next((mark for mark in field.metadata if isinstance(mark, Effect)), None)


def _inner(value: Any, place: str, counts: Callable[[Effect], bool]) -> Any:
    """The identity of sections inside a setting."""
    if value is None:
        return None
    if isinstance(value, Section):
        return value.identity(counts)
    if isinstance(value, Mapping):
        return {key: _inner(entry, place, counts) for key, entry in value.items()}
    raise TypeError(f"{place}: not marked as Output, Batches, Neutral or Content")
