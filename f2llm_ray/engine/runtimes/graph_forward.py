"""The forward pass by ONNX Runtime or OpenVINO, on CPU: texts of nearly equal lengths share a pass.

Shapes: n texts, t places of the longest of a pass, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine.names import GraphName
from f2llm_ray.engine.pooling import Places, pool
from f2llm_ray.engine.runtimes.proof import Run, padded
from f2llm_ray.engine.torch_forward import CPU_PASS
from f2llm_ray.model.families import Pooling

PADDING = 32
"""Most places of a pass that may be padding: what they cost is about what another pass costs."""


def plan_even(lengths: Sequence[int], tokens_per_pass: int) -> list[list[int]]:
    """Groups texts into passes, longest first, with at most `PADDING` places of padding in each.

    A pass has at most `tokens_per_pass` places; a longer text has its own.

    Returns:
        The indices of the texts of each pass; together they are 0..n-1, each once.
    """
    passes: list[list[int]] = []
    longest = padding = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        short = longest - lengths[index]
        if not passes or padding + short > PADDING or (len(passes[-1]) + 1) * longest > tokens_per_pass:
            passes.append([])
            longest, padding, short = lengths[index], 0, 0
        passes[-1].append(index)
        padding += short
    return passes


class GraphForward:
    """A graph that is loaded.

    Args:
        name: the runtime.
        run: gives the hidden states [n, t, d] of ids and mask [n, t].
        pooling: how a text's vector comes of its tokens.
        hidden: d.
        tokens_per_pass: most places of a pass, at most `CPU_PASS`.
    """

    device = "cpu"

    def __init__(self, name: GraphName, run: Run, pooling: Pooling, hidden: int, tokens_per_pass: int) -> None:
        self.name, self.run, self.pooling, self.hidden = name, run, pooling, hidden
        self.tokens_per_pass = min(tokens_per_pass, CPU_PASS)

    def encode(self, tokens: Sequence[Tokens]) -> torch.Tensor:
        """Vectors [n, d] of token lists before normalisation, in the given order."""
        vectors_nd = torch.empty(len(tokens), self.hidden)
        for indices in plan_even([len(text) for text in tokens], self.tokens_per_pass):
            texts = [tokens[index] for index in indices]
            hidden_ntd = torch.from_numpy(self.run(*padded(texts, "right")))
            places = Places.padded(np.array([len(text) for text in texts]))
            vectors_nd[indices] = pool(hidden_ntd.flatten(0, 1), places, self.pooling)
        return vectors_nd
