"""The forward pass by torch: packed texts on the GPU where there is one, else on CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine.attention import use_varlen
from f2llm_ray.engine.encode import encode
from f2llm_ray.model.checkpoint import load_backbone
from f2llm_ray.model.families import Pooling
from f2llm_ray.model.int8 import is_quantized
from f2llm_ray.model.prune import first_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU_PASS = 1024
"""Most tokens of a pass on CPU. Larger ones fall out of its cache: a text of 65 tokens takes 5.0 ms of one thread
in passes of up to 1,024 tokens and 6.1 ms in passes of 8,192 (a 4-layer, 256-wide model)."""


class TorchForward:
    """A backbone that is loaded.

    Args:
        backbone: on CPU in float32, or on a GPU.
        pooling: how a text's vector comes of its tokens.
        tokens_per_pass: most tokens of a pass; on CPU at most `CPU_PASS`.
    """

    name: Literal["torch"] = "torch"

    def __init__(self, backbone: PreTrainedModel, pooling: Pooling, tokens_per_pass: int) -> None:
        self.backbone, self.pooling, self.tokens_per_pass = backbone, pooling, tokens_per_pass
        self.device: str = backbone.device.type
        if self.device == "cpu":
            use_varlen(backbone)
            self.tokens_per_pass = min(tokens_per_pass, CPU_PASS)

    @classmethod
    def of_folder(
        cls, folder: Path, pooling: Pooling, tokens_per_pass: int, layers: int | None = None
    ) -> TorchForward:
        """Loads a model folder, in bf16 where there is a GPU; int8 weights stay on the CPU.

        `layers` takes so many of its first ones alone.

        Raises:
            RunError: it cannot be loaded.
            RecipeError: it has no so many layers.
        """
        device = "cuda" if torch.cuda.is_available() and not is_quantized(folder) else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        backbone = load_backbone(folder, dtype=dtype)
        if layers is not None:
            backbone = first_layers(backbone, layers)
        return cls(backbone.to(device).eval(), pooling, tokens_per_pass)

    def encode(self, tokens: Sequence[Tokens]) -> torch.Tensor:
        """Vectors [n, d] of token lists before normalisation, in the given order."""
        return encode(self.backbone, tokens, pooling=self.pooling, tokens_per_pass=self.tokens_per_pass)
