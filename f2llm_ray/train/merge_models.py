"""Merging finished models into one."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.tokens.tokenizer import TOKENIZER, differences
from f2llm_ray.model.checkpoint import ModelInfo, load_backbone, load_info
from f2llm_ray.model.settings import Soup
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.model_folder import write_reweighted

if TYPE_CHECKING:
    import torch

SAME = ("dims", "pooling", "instructions")
"""Facts of models in which those that are merged must agree."""


def merge_models(settings: Soup, models: list[Folder], name: str, out: Folder) -> dict[str, Any]:
    """Merges models, all of which are in memory meanwhile; the facts and the tokenizer are the first one's.

    Args:
        settings: the method, and the share of each.
        models: their folders.
        name: name of the merged model.
        out: folder that gets `model/`.

    Returns:
        Facts for the manifest: the method, the models and their shares.

    Raises:
        RunError: they differ in what must be the same, such as shape, tokenizer, dims or pooling.
    """
    from f2llm_ray.model.merge import average, slerp

    first, *others = models
    info, *found = (load_info(model) for model in models)
    for other, facts in zip(others, found, strict=True):
        _check(info, first, facts, other)
    exits = tuple(layers for layers in info.exits if all(layers in facts.exits for facts in found))
    space = info.space if all(facts.space == info.space for facts in found) else None  # between two lies neither
    with ExitStack() as stack:
        path, *paths = (stack.enter_context(model.as_local()) for model in models)
        states = [load_backbone(other).state_dict() for other in paths]

        def merged(key: str, value: torch.Tensor) -> torch.Tensor:
            versions = [value]
            for state, other in zip(states, others, strict=True):
                found = state.get(key)
                if found is None or found.shape != value.shape:
                    what = "none" if found is None else list(found.shape)
                    raise RunError(
                        f"{other.uri}: weight {key}: found {what}, expected {list(value.shape)} as in {first.uri}"
                    )
                versions.append(found)
            if settings.method == "slerp":
                return slerp(versions[0], versions[1], settings.shares[1])
            return average(versions, settings.shares)

        with (out / "model").writing() as folder:
            write_reweighted(path, folder, replace(info, name=name, exits=exits, space=space), merged)
    shares = dict(zip((model.uri for model in models), settings.shares, strict=True))
    return {"merging": {"method": settings.method, "shares": shares}}


def _check(info: ModelInfo, first: Folder, found: ModelInfo, other: Folder) -> None:
    for fact in SAME:
        ours, theirs = getattr(info, fact), getattr(found, fact)
        if ours != theirs:
            raise RunError(f"{other.uri}: {fact} is {theirs}, expected {ours} as in {first.uri}")
    parts = differences(first, other)
    if parts:
        raise RunError(f"{other.uri}/{TOKENIZER}: differs from that of {first.uri} in {', '.join(parts)}")
