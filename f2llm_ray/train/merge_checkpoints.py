"""Merging a finished stage's model with the checkpoints before it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from f2llm_ray.base.errors import RunError
from f2llm_ray.run.folder import Folder
from f2llm_ray.train import checkpoints
from f2llm_ray.train.loop import RAY_TRAIN
from f2llm_ray.train.settings import Merge


def merge_stage(settings: Merge, trained: Folder, name: str, out: Folder) -> dict[str, Any]:
    """Merges the exported model of a stage with its last checkpoints.

    In memory are the merged model, the exported one, and one weight at a time of each checkpoint.

    Args:
        settings: how many and by which method.
        trained: the finished stage's folder, with `model/`, `training.json` and checkpoints.
        name: name of the merged model.
        out: folder that gets `model/`.

    Returns:
        What the manifest says: the method, and the steps that were merged.

    Raises:
        RunError: fewer whole checkpoints than wanted, or a damaged one.
    """
    from f2llm_ray.data.tokens.tokenizer import load_tokenizer
    from f2llm_ray.model.checkpoint import load_backbone, load_info, save_model
    from f2llm_ray.model.merge import average, slerp
    from f2llm_ray.model.vocabulary import load_map, save_map

    steps = int(trained.read_json("training.json")["steps"])
    before = checkpoints.listed(trained / RAY_TRAIN)[: settings.last - 1]
    if len(before) < settings.last - 1:
        raise RunError(
            f"{trained.uri}: merge.last is {settings.last}, but beside the model of step {steps:,} there are only "
            f"the checkpoints of steps {sorted(c.step for c in before)}; lower checkpoint_every and train again"
        )
    before.reverse()
    with ExitStack() as stack:
        path = stack.enter_context((trained / "model").as_local())
        backbone, info, tokenizer = load_backbone(path), load_info(path), load_tokenizer(path)
        exported = backbone.state_dict()
        earlier = [stack.enter_context(checkpoints.weights(checkpoint)) for checkpoint in before]
        state = {}
        for key, last in exported.items():
            versions = [*(read(f"backbone.{key}") for read in earlier), last]
            state[key] = slerp(*versions) if settings.method == "slerp" else average(versions)
        table = load_map(path)
        with (out / "model").writing() as folder:
            save_model(folder, backbone, tokenizer, replace(info, name=name), state=state)
            if table is not None:
                save_map(table, folder)
    return {"merging": {"method": settings.method, "steps": [*(c.step for c in before), steps]}}
