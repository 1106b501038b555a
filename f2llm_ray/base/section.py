"""The base of every typed section of a recipe."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


def _name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(f"found {name!r} as name, expected letters a to z, digits, _, . and -")
    return name


Name = Annotated[str, AfterValidator(_name)]
"""What a recipe calls a source, a stage or a set; files and folders are named after it."""


class Section(BaseModel):
    """A frozen part of a recipe; a key it does not know is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
