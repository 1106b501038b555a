"""The text side of a model folder, without torch: its facts, its tokenizer, and what calibration measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from f2llm_ray.data.tokens.store import Tokens, tokenize
from f2llm_ray.data.tokens.tokenizer import load_tokenizer
from f2llm_ray.engine.calibration import load_calibration
from f2llm_ray.model.checkpoint import load_info
from f2llm_ray.model.dims import Vectors


class TextEngine(ABC):
    """A model folder that turns texts into vectors; a subclass runs the weights, here or in another process.

    Raises:
        RunError: the folder is not a model folder, or its calibration is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.info = load_info(folder)
        self.tokenizer = load_tokenizer(folder)
        self.calibration = load_calibration(folder)

    @abstractmethod
    def embed_tokens(self, tokens: Sequence[Tokens], *, dim: int | None = None) -> Vectors:
        """Unit vectors [n, dim] (the whole d when unset) of token lists, in the given order."""

    @property
    def ranges(self) -> Mapping[int, Vectors]:
        """[2, k] by trained dim k: least and greatest value of each dim, for int8; none where not calibrated."""
        return {} if self.calibration is None else self.calibration.ranges

    def tokenize(self, texts: Sequence[str], *, prompt: str = "", max_tokens: int | None = None) -> list[Tokens]:
        """Token ids of each text, the prompt before it and EOS last; cut to max_tokens where given."""
        return tokenize(self.tokenizer, [prompt + text for text in texts], max_tokens)

    def embed(self, texts: Sequence[str], *, prompt: str = "", dim: int | None = None) -> Vectors:
        """Unit vectors [n, dim] of texts, cut to the model's own max_tokens, in the given order."""
        tokens = self.tokenize(texts, prompt=prompt, max_tokens=self.info.max_tokens)
        return self.embed_tokens(tokens, dim=dim)

    def embed_counted(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors [n, d] of texts as `embed` gives them, and how many tokens these were."""
        tokens = self.tokenize(texts, max_tokens=self.info.max_tokens)
        return self.embed_tokens(tokens), sum(map(len, tokens))
