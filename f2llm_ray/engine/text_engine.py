"""The text side of a model folder, without torch: its facts, its tokenizer, and its calibration.

That is what serving must know of a model beyond its weights: int8 ranges of each dim, and vectors to check it by.
Both are measured once, when the model is made, and lie with it in `f2llm/calibration.safetensors`.

Shapes: n texts, k one of the trained dims, d the whole vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.tokens.store import Tokens, tokenize
from f2llm_ray.data.tokens.tokenizer import load_tokenizer
from f2llm_ray.model.checkpoint import CALIBRATION_FILE, load_info
from f2llm_ray.model.dims import Vectors, cut_dims
from f2llm_ray.run.folder import Folder

CHECK_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Кошка сидит на окне и смотрит на дождь.",
    "猫が窓のそばで眠っています。",
    "مرحبا، كيف حالك اليوم؟",
    "नमस्ते दुनिया",
    "def add(a, b):\n    return a + b",
)
"""Fixed, so that no training text travels with a model; several scripts, so that a wrong tokenizer shows."""
WORST = 1e-3
"""Most that 1 - cosine of a check text may be: another machine gives about 1e-6 in float32, another model 0.1."""


@dataclass(frozen=True)
class Calibration:
    """What `f2llm/calibration.safetensors` holds."""

    ranges: Mapping[int, Vectors]
    """[2, k] by trained dim k: least and greatest value of each dim of vectors cut to k and re-normalised."""
    check_nd: Vectors
    """Unit vectors of `CHECK_TEXTS`."""


def save_calibration(folder: Folder, calibration: Calibration) -> None:
    """Writes the file into a model folder."""
    from safetensors.numpy import save

    tensors = {f"ranges.{dim}": ranges_2k for dim, ranges_2k in calibration.ranges.items()}
    place, _, name = CALIBRATION_FILE.rpartition("/")
    (folder / place).write_bytes(name, save({**tensors, "check": calibration.check_nd}))


def load_calibration(folder: Path) -> Calibration | None:
    """Reads the file of a model folder; None where it has no such file.

    Raises:
        RunError: the file is damaged, or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / CALIBRATION_FILE
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        check_nd = tensors.pop("check")
        ranges = {int(name.removeprefix("ranges.")): ranges_2k for name, ranges_2k in tensors.items()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"{path}: not the calibration of a model: {error}") from None
    if len(check_nd) != len(CHECK_TEXTS) or any(r.shape != (2, dim) for dim, r in ranges.items()):
        raise RunError(f"{path}: not the calibration of a model: its tensors have other shapes")
    return Calibration(ranges, check_nd)


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


def calibrate(engine: TextEngine, tokens: Sequence[Tokens]) -> Calibration:
    """Measures a model on token lists of training texts (what it will be asked: queries and passages)."""
    vectors_nd = engine.embed_tokens(tokens)
    ranges = {}
    for dim in engine.info.dims:
        cut_nk = cut_dims(vectors_nd, dim)
        ranges[dim] = np.stack([cut_nk.min(axis=0), cut_nk.max(axis=0)])
    return Calibration(ranges, engine.embed(CHECK_TEXTS))


def self_check(engine: TextEngine, calibration: Calibration, place: str) -> None:
    """Embeds the check texts again and compares them with the vectors stored when the model was made.

    Raises:
        RunError: a vector of another width, or one whose cosine is off by more than `WORST`.
    """
    found_nd = engine.embed(CHECK_TEXTS)
    if found_nd.shape != calibration.check_nd.shape:
        raise RunError(
            f"{place}: self-check failed: vectors of {found_nd.shape[1]} dims, stored ones have "
            f"{calibration.check_nd.shape[1]}"
        )
    off_n = 1 - np.sum(found_nd * calibration.check_nd, axis=1)
    worst = int(np.argmax(off_n))
    if not off_n[worst] <= WORST:  # so that NaN fails too
        raise RunError(
            f"{place}: self-check failed: the vector of {CHECK_TEXTS[worst]!r} is {off_n[worst]:.2g} away "
            f"(1 - cosine) from the one stored when the model was made, at most {WORST:g} is allowed"
        )
