"""A model whose vectors a test chooses, by text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from f2llm_ray.model.checkpoint import ModelInfo


class Planted:
    """What evaluation asks of a model."""

    device = "cpu"
    ranges: Mapping[int, np.ndarray] = {}

    def __init__(self, vectors: Mapping[str, Sequence[float]], *, instructions: bool = False) -> None:
        self.vectors = {text: np.array(vector, dtype=np.float32) for text, vector in vectors.items()}
        self.asked: list[str] = []
        self.info = ModelInfo(
            name="planted", dims=(1,), max_tokens=9, prompts={"query": ""}, instructions=instructions
        )

    def embed_counted(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        self.asked += texts
        return np.stack([self.vectors[text] for text in texts]), len(texts)
