"""Settings of the models: the backbone that a run starts from, and what pruning keeps of a trained one."""

from __future__ import annotations

from pydantic import Field, model_validator

from f2llm_ray.model.sizes import Shape
from f2llm_ray.section import Section


class Backbone(Section):
    """The model that training starts from: a checkpoint, or a random one of a given shape."""

    path: str | None = None
    """Hub name or local folder of a decoder checkpoint."""
    shape: Shape | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Backbone:
        if (self.path is None) == (self.shape is None):
            raise ValueError("set exactly one of path and shape")
        return self


class Prune(Section):
    """Structured pruning of a trained stage into a smaller stock model."""

    model: str
    """The stage to prune."""
    layers: int = Field(ge=1)
    hidden: int = Field(ge=8)
    ffn: int = Field(ge=8)
    calibration_rows: int = Field(default=512, ge=1)
    """Training rows whose texts the importance scores are measured on, drawn over all sources."""
