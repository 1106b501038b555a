"""Merging a finished stage's model with the checkpoints before it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from f2llm_ray.base.errors import RunError
from f2llm_ray.run.folder import Folder
from f2llm_ray.train import checkpoints
from f2llm_ray.train.model_folder import write_reweighted
from f2llm_ray.train.settings import Lora, Merge
from f2llm_ray.train.training import RAY_TRAIN

if TYPE_CHECKING:
    import torch


def merge_stage(
    settings: Merge,
    trained: Folder,
    name: str,
    out: Folder,
    checkpoint_every: int,
    *,
    lora: Lora | None = None,
    student: Folder | None = None,
) -> dict[str, Any]:
    """Merges the exported model of a stage with the checkpoints before it.

    In memory are the merged model, the exported one, and one weight at a time of each checkpoint; with LoRA also
    the model that the stage began from.

    Args:
        settings: how many models are merged, and by which method.
        trained: the finished stage's folder, with `model/`, `training.json` and checkpoints.
        name: name of the merged model.
        out: folder that gets `model/`.
        checkpoint_every: steps between the stage's checkpoints. Those at its last multiples before the model's own
            step are merged, and no others.
        lora: that of the stage, whose checkpoints hold the changes alone.
        student: the model folder that the stage began from; needed with LoRA.

    Returns:
        Facts for the manifest: the method, and the steps that were merged.

    Raises:
        RunError: one of these checkpoints is missing or damaged, or the stage was too short to write so many.
    """
    from f2llm_ray.model.checkpoint import load_backbone, load_info
    from f2llm_ray.model.merge import average, slerp

    steps, count = int(trained.read_json("training.json")["steps"]), settings.last - 1
    wanted = list(range(checkpoint_every, steps, checkpoint_every))[-count:]
    # The latest of a step first, so that it is the one that stays.
    found = {checkpoint.step: checkpoint for checkpoint in reversed(checkpoints.listed(trained / RAY_TRAIN))}
    if len(wanted) < count or not found.keys() >= set(wanted):
        raise RunError(
            f"{trained.uri}: merge.last is {settings.last}, but beside the model of step {steps:,} there are the "
            f"checkpoints of steps {sorted(found)}; {count} are needed, and with checkpoint_every "
            f"{checkpoint_every} they are those of steps {wanted}; train again, with a lower checkpoint_every if "
            "these are too few"
        )
    with ExitStack() as stack:
        path = stack.enter_context((trained / "model").as_local())
        earlier = [stack.enter_context(checkpoints.weights(found[step], lora)) for step in wanted]
        before: dict[str, torch.Tensor] = {}
        if student is not None:
            before = load_backbone(stack.enter_context(student.as_local())).state_dict()

        def merged(key: str, last: torch.Tensor) -> torch.Tensor:
            versions = [*(read(key, before.get(key, last)) for read in earlier), last]
            return slerp(versions[0], versions[1]) if settings.method == "slerp" else average(versions)

        with (out / "model").writing() as folder:
            write_reweighted(path, folder, replace(load_info(path), name=name), merged)
    return {"merging": {"method": settings.method, "steps": [*wanted, steps]}}
