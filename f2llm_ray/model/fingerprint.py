"""What tells a model folder from any other, without reading all of it."""

from __future__ import annotations

import hashlib

from f2llm_ray.model.checkpoint import CALIBRATION_FILE
from f2llm_ray.run.folder import Folder

SAMPLE = 1 << 20
"""Bytes at each end of a weight file that tell two models apart; training moves every weight."""


def fingerprint(model: Folder) -> str:
    """Tells a model from any other by its facts, tokenizer and both ends of each weight file, wherever it lies.

    What is measured of it afterwards, its calibration, does not count.
    """
    digest = hashlib.blake2b(digest_size=8)
    weights = [name for name in model.files(".safetensors") if name != CALIBRATION_FILE]
    for name in (*model.files(".json"), *weights):
        with model.filesystem.open_input_file(f"{model.path}/{name}") as file:
            size = file.size()
            digest.update(f"{name} {size} ".encode())
            digest.update(file.read(size if name.endswith(".json") else SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read())
    return digest.hexdigest()
