"""The Ray Train edge: one training stage on the cluster."""

from __future__ import annotations

from typing import Any

from f2llm_ray.recipe import Distill, Recipe, TrainStage
from f2llm_ray.run import Folder
from f2llm_ray.train.board import watched
from f2llm_ray.train.loader import build_batches
from f2llm_ray.train.loop import Job, work


def train(
    recipe: Recipe,
    name: str,
    stage: TrainStage | Distill,
    *,
    prepared: Folder,
    mined: Folder | None,
    student: Folder,
    teacher: Folder | None,
    out: Folder,
) -> dict[str, Any]:
    """Runs one stage; an earlier try that was cut off goes on from its last checkpoint.

    Args:
        recipe: the run's recipe.
        name: the stage's name.
        stage: its settings.
        prepared: folder of the prepare stage.
        mined: folder of the mining stage, where the recipe has one before this stage.
        student: model folder that it starts from.
        teacher: model folder of the teacher, when distilling.
        out: the stage's folder; it gets `batches/`, `ray_train/` (checkpoints) and `model/`.

    Returns:
        What the manifest says of the training.

    Raises:
        RunError: the loss is no number.
    """
    import ray.train
    import ray.train.torch

    batches = out / "batches"
    if not batches.exists("validation/order.npy"):
        build_batches(recipe, name, stage, prepared, mined, batches)
    compute = recipe.compute
    run_id = f"{name}-{out.path.rsplit('/', 1)[-1]}"
    job = Job(
        recipe=recipe,
        name=name,
        stage=stage,
        sources=tuple(recipe.stage_sources(stage)),
        student=student,
        teacher=teacher,
        tokens=prepared / "tokens",
        batches=batches,
        out=out,
        run_id=run_id,
    )
    gpus = compute.gpus_per_worker
    trainer = ray.train.torch.TorchTrainer(
        work,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=compute.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": compute.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
        ),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=ray.train.RunConfig(
            name="ray_train",
            storage_path=out.path,
            storage_filesystem=out.filesystem,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=stage.keep_checkpoints),
            failure_config=ray.train.FailureConfig(max_failures=compute.max_failures),
        ),
    )
    with watched(run_id, name):
        trainer.fit()
    training: dict[str, Any] = out.read_json("training.json")
    return {"training": training}
