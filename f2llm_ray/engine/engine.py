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

    Raises:
        RunError: the folder is not a model folder, its calibration is damaged, or the engine that is asked for
            cannot run it.
        DataError: a package of the engine that is asked for is missing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tokens_per_pass: int = 16_384,
        engine: EngineName = "torch",
        make: bool = True,
    ) -> None:
        super().__init__(folder)
        self.vocabulary = vocabulary_size(folder)
        chosen = choose(folder, self.info, engine, tokens_per_pass, make=make)
        self._long: TorchForward | None = None
        """For texts that the proof of a graph does not reach: its scores would take memory with their square."""
        self.forward: GraphForward | TorchForward
        if chosen.graph is None:
            self.forward = TorchForward.of_folder(folder, self.info.pooling, tokens_per_pass)
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
        # Longest first: texts that share a pass are then of similar lengths.
        order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        texts = [tokens[i] for i in order]
        long = 0 if self._long is None else sum(len(text) > LONGEST for text in texts)
        vectors_nd = self.forward.encode(texts[long:])
        if self._long is not None and long:
            vectors_nd = torch.cat([self._long.encode(texts[:long]).to(vectors_nd), vectors_nd])
        place = torch.tensor(order, dtype=torch.long, device=vectors_nd.device)
        return vectors_nd[torch.argsort(place)].float()

    @torch.inference_mode()
    def embed_tokens(self, tokens: Sequence[Tokens], *, dim: int | None = None) -> Vectors:
        """Unit vectors [n, dim] (the whole d when unset) of token lists, in the given order."""
        return normalize(self.encode(tokens)[:, :dim], dim=-1).cpu().numpy()
