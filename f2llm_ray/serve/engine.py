"""The engine: texts in, unit vectors out. Serving, bulk embedding and evaluation all use this class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.nn.functional import normalize

from f2llm_ray.data.tokens import tokenize
from f2llm_ray.model.checkpoint import load_backbone, load_info, load_tokenizer
from f2llm_ray.model.dims import Vectors
from f2llm_ray.model.encoder import Tokens, encode
from f2llm_ray.model.int8 import is_quantized
from f2llm_ray.model.varlen import use_varlen
from f2llm_ray.serve.calibrate import load_calibration

CPU_PASS = 1024
"""Most tokens of a pass on CPU. Larger ones fall out of its cache: a text of 65 tokens takes 5.0 ms of one thread
in passes of up to 1,024 tokens and 6.1 ms in passes of 8,192 (a 4-layer, 256-wide model)."""


class Engine:
    """A model folder made ready to embed, on the GPU where there is one; int8 weights stay on the CPU.

    Raises:
        RunError: the folder is not a model folder, or its calibration is damaged.
    """

    def __init__(self, folder: Path, *, tokens_per_pass: int = 16_384) -> None:
        self.info = load_info(folder)
        self.tokenizer = load_tokenizer(folder)
        self.calibration = load_calibration(folder)
        self.device = "cuda" if torch.cuda.is_available() and not is_quantized(folder) else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.backbone = load_backbone(folder, dtype=dtype).to(self.device).eval()
        self.tokens_per_pass = tokens_per_pass
        if self.device == "cpu":
            use_varlen(self.backbone)
            self.tokens_per_pass = min(tokens_per_pass, CPU_PASS)

    @property
    def ranges(self) -> Mapping[int, Vectors]:
        """[2, k] by trained dim k: least and greatest value of each dim, for int8; none where not calibrated."""
        return {} if self.calibration is None else self.calibration.ranges

    def tokenize(self, texts: Sequence[str], *, prompt: str = "", max_tokens: int | None = None) -> list[Tokens]:
        """Token ids of each text, the prompt before it and EOS last; cut to max_tokens where given."""
        return tokenize(self.tokenizer, [prompt + text for text in texts], max_tokens)

    def encode(self, tokens: Sequence[Tokens]) -> torch.Tensor:
        """Vectors [n, d] of token lists before normalisation, on the device of the model, in the given order."""
        # Longest first: texts that share a pass are then of similar lengths.
        order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        vectors_nd = encode(self.backbone, [tokens[i] for i in order], tokens_per_pass=self.tokens_per_pass)
        place = torch.tensor(order, dtype=torch.long, device=vectors_nd.device)
        return vectors_nd[torch.argsort(place)].float()

    @torch.inference_mode()
    def embed_tokens(self, tokens: Sequence[Tokens], *, dim: int | None = None) -> Vectors:
        """Unit vectors [n, dim] (the whole d when unset) of token lists, in the given order."""
        return normalize(self.encode(tokens)[:, :dim], dim=-1).cpu().numpy()

    def embed(self, texts: Sequence[str], *, prompt: str = "", dim: int | None = None) -> Vectors:
        """Unit vectors [n, dim] of texts, cut to the model's own max_tokens, in the given order."""
        tokens = self.tokenize(texts, prompt=prompt, max_tokens=self.info.max_tokens)
        return self.embed_tokens(tokens, dim=dim)

    def embed_counted(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors [n, d] of texts as `embed` gives them, and how many tokens these were."""
        tokens = self.tokenize(texts, max_tokens=self.info.max_tokens)
        return self.embed_tokens(tokens), sum(map(len, tokens))
