"""The engine: texts in, unit vectors out. Serving, bulk embedding and evaluation all use this class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import normalize

from f2llm_ray.base.progress import say
from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine.names import EngineName
from f2llm_ray.engine.runtimes.choice import choose
from f2llm_ray.engine.runtimes.golden import LONGEST
from f2llm_ray.engine.runtimes.graph_forward import GraphForward
from f2llm_ray.engine.text_engine import TextEngine
from f2llm_ray.engine.torch_forward import TorchForward
from f2llm_ray.model.checkpoint import has_weights, vocabulary_size
from f2llm_ray.model.dims import Vectors


class Engine(TextEngine):
    """A model folder made ready to embed, on the GPU where there is one; int8 weights stay on the CPU.

    Whatever computes the forward pass, all else is the same: tokens, pooling, normalisation, dims.

    Args:
        folder: the model folder; an export without weights is one for the runtimes that it has files of.
        tokens_per_pass: most tokens of a pass.
        engine: what computes the forward pass (`settings.Compute.engine`).
        make: whether `auto` makes the files that other engines need, which takes seconds; else it takes those that
            are there.
        layers: takes so many of the first layers alone, by torch.

    Raises:
        RunError: the folder is not a model folder, its calibration is damaged, or the engine that is asked for
            cannot run it.
        RecipeError: it has no so many layers.
        DataError: a package of the engine that is asked for is missing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tokens_per_pass: int = 16_384,
        engine: EngineName = "torch",
        make: bool = True,
        layers: int | None = None,
    ) -> None:
        super().__init__(folder)
        self.vocabulary = vocabulary_size(folder)
        if layers is not None:
            engine, self.calibration = "torch", None  # graphs and calibration are those of the whole model
        chosen = choose(folder, self.info, engine, tokens_per_pass, make=make)
        self._long: TorchForward | None = None
        """For texts that the proof of a graph does not reach: its scores would take memory with their square."""
        self.forward: GraphForward | TorchForward
        if chosen.graph is None:
            self.forward = TorchForward.of_folder(folder, self.info.pooling, tokens_per_pass, layers)
        else:
            self.forward = chosen.graph
            if self.info.max_tokens > LONGEST and has_weights(folder):
                self._long = TorchForward.of_folder(folder, self.info.pooling, tokens_per_pass)
        self.engine: str = self.forward.name
        """What computes the forward pass: torch, onnx or openvino."""
        self.device: str = self.forward.device
        if engine != "torch":
            say(f"{self.info.name}: engine {self.engine}{chosen.reason and f': {chosen.reason}'}")

    def encode(self, tokens: Sequence[Tokens]) -> torch.Tensor:
        """Vectors [n, d] of token lists before normalisation, on the device of the model, in the given order."""
        long = [] if self._long is None else [i for i, text in enumerate(tokens) if len(text) > LONGEST]
        if self._long is None or not long:
            return self.forward.encode(tokens).float()
        short = sorted(set(range(len(tokens))) - set(long))
        vectors_nd = torch.empty(len(tokens), self.info.dims[-1])
        for forward, places in ((self._long, long), (self.forward, short)):
            vectors_nd[places] = forward.encode([tokens[place] for place in places]).float()
        return vectors_nd

    @torch.inference_mode()
    def embed_tokens(self, tokens: Sequence[Tokens], *, dim: int | None = None) -> Vectors:
        """Unit vectors [n, dim] (the whole d when unset) of token lists, in the given order."""
        return normalize(self.encode(tokens)[:, :dim], dim=-1).cpu().numpy()
