"""Models from elsewhere that a recipe measures beside its own: where they are, and what they are known by."""

from __future__ import annotations

import re

from f2llm_ray.base.errors import DataError
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import InputFile, model_inputs
from f2llm_ray.train.settings import is_endpoint

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def baseline_files(model: str) -> list[InputFile]:
    """What a baseline is read from; the name of an endpoint, or on the hub, stands for what it computes.

    Raises:
        DataError: it is none of what a baseline may be.
    """
    if is_endpoint(model):
        return [InputFile(model, None, model)]
    files = model_inputs(model)
    on_hub = bool(files) and bool(files[0].version)
    if on_hub and HUB_NAME.fullmatch(model):
        return files
    if on_hub or not any(file.uri.endswith(".safetensors") for file in files):
        raise DataError(
            f"evaluation.baselines: {model}: found no model there, expected a folder with safetensors, OWNER/NAME "
            "on the hub, or URL#NAME"
        )
    return files


def baseline_place(model: str) -> Folder | str:
    """The folder of a baseline, or its name on the hub."""
    return model if model_inputs(model)[:1] == [InputFile(f"hub:{model}", None, model)] else Folder.at(model)
