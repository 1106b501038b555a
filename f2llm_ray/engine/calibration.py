"""What serving must know of a model beyond its weights: int8 ranges of each dim, and vectors to check it by.

Both are measured once, when the model is made, and lie beside it in `calibration.safetensors`.

Shapes: n texts, k one of the trained dims, d the whole vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from f2llm_ray.base.errors import RunError
from f2llm_ray.model.checkpoint import CALIBRATION_FILE
from f2llm_ray.model.dims import Vectors
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


@dataclass(frozen=True)
class Calibration:
    """What `calibration.safetensors` holds."""

    ranges: Mapping[int, Vectors]
    """[2, k] by trained dim k: least and greatest value of each dim of vectors cut to k and re-normalised."""
    check_nd: Vectors
    """Unit vectors of `CHECK_TEXTS`."""


def save_calibration(folder: Folder, calibration: Calibration) -> None:
    """Writes the file into a model folder."""
    from safetensors.numpy import save

    tensors = {f"ranges.{dim}": ranges_2k for dim, ranges_2k in calibration.ranges.items()}
    folder.write_bytes(CALIBRATION_FILE, save({**tensors, "check": calibration.check_nd}))


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
