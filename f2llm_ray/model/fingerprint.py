"""A short hash that differs between model folders, made without reading all of their weights."""

from __future__ import annotations

import hashlib

from f2llm_ray.model.checkpoint import CALIBRATION_FILE
from f2llm_ray.run.folder import Folder

SAMPLE = 1 << 20
"""Bytes at each end of a weight file that are hashed; training changes every weight."""


def fingerprint(model: Folder) -> str:
    """A hash of a model's facts, tokenizer and both ends of each weight file; its folder's place does not count.

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
