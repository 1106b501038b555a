"""The base of every typed section of a recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen part of a recipe; a key it does not know is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
