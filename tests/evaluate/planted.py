"""A model whose vectors a test chooses, by text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np


class Planted:
    """What evaluation asks of an engine."""

    device = "cpu"

    def __init__(self, vectors: Mapping[str, Sequence[float]], *, instructions: bool = False) -> None:
        self.vectors = {text: np.array(vector, dtype=np.float32) for text, vector in vectors.items()}
        self.texts = list(self.vectors)
        self.asked: list[str] = []
        self.info = SimpleNamespace(name="planted", instructions=instructions, max_tokens=9)

    def tokenize(self, texts: Sequence[str], *, max_tokens: int | None = None) -> list[np.ndarray]:
        assert max_tokens == 9
        self.asked += texts
        return [np.array([self.texts.index(text)]) for text in texts]

    def embed_tokens(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([self.vectors[self.texts[int(ids[0])]] for ids in tokens])
