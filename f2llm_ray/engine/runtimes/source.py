"""What an export is made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from f2llm_ray.model.checkpoint import ModelInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Source:
    """A model folder that is loaded."""

    model: Path
    info: ModelInfo
    backbone: PreTrainedModel
    """In float32, on CPU."""
