"""The engine: texts in, unit vectors out. Serving, bulk embedding and evaluation all use this class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import normalize

from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine.attention import use_varlen
from f2llm_ray.engine.encode import encode
from f2llm_ray.engine.text_engine import TextEngine
from f2llm_ray.model.checkpoint import load_backbone
from f2llm_ray.model.dims import Vectors
from f2llm_ray.model.int8 import is_quantized
from f2llm_ray.model.prune import first_layers

CPU_PASS = 1024
"""Most tokens of a pass on CPU. Larger ones fall out of its cache: a text of 65 tokens takes 5.0 ms of one thread
in passes of up to 1,024 tokens and 6.1 ms in passes of 8,192 (a 4-layer, 256-wide model)."""


class Engine(TextEngine):
    """A model folder made ready to embed, on the GPU where there is one; int8 weights stay on the CPU.

    Raises:
        RunError: the folder is not a model folder, or its calibration is damaged.
        RecipeError: it has no so many layers.
    """

    def __init__(self, folder: Path, *, tokens_per_pass: int = 16_384, layers: int | None = None) -> None:
        """Loads a folder; `layers` takes so many of its first ones alone."""
        super().__init__(folder)
        self.device = "cuda" if torch.cuda.is_available() and not is_quantized(folder) else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        backbone = load_backbone(folder, dtype=dtype)
        if layers is not None:
            backbone = first_layers(backbone, layers)
            self.calibration = None  # that of the whole model
        self.backbone = backbone.to(self.device).eval()
        self.tokens_per_pass = tokens_per_pass
        if self.device == "cpu":
            use_varlen(self.backbone)
            self.tokens_per_pass = min(tokens_per_pass, CPU_PASS)

    def encode(self, tokens: Sequence[Tokens]) -> torch.Tensor:
        """Vectors [n, d] of token lists before normalisation, on the device of the model, in the given order."""
        return encode(
            self.backbone, tokens, pooling=self.info.pooling, tokens_per_pass=self.tokens_per_pass
        ).float()

    @torch.inference_mode()
    def embed_tokens(self, tokens: Sequence[Tokens], *, dim: int | None = None) -> Vectors:
        """Unit vectors [n, dim] (the whole d when unset) of token lists, in the given order."""
        return normalize(self.encode(tokens)[:, :dim], dim=-1).cpu().numpy()
