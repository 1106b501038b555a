"""Running a training on the cluster with Ray Train."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from f2llm_ray.base import formatting
from f2llm_ray.base.errors import F2LLMError, plain_error
from f2llm_ray.base.progress import say
from f2llm_ray.data.tokens.build import read_prompts
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.checkpoints import listed, settle
from f2llm_ray.train.deepspeed import deepspeed_config
from f2llm_ray.train.interrupt import interruptible
from f2llm_ray.train.loop import BEST, FAILURE, work
from f2llm_ray.train.pace import PACE_FILE, SHARE, Pace, steps_in, timed_settings
from f2llm_ray.train.teacher import BATCHES, VECTORS, check_online, space_dims, space_of
from f2llm_ray.train.training import (
    RAY_TRAIN,
    Training,
    TrainJob,
    check_exits,
    check_held_out,
    check_lora,
    write_batches,
)
from f2llm_ray.train.watch import SCORES_FILE, watched

CONFIG = "deepspeed.json"
"""Written at the start of each try."""


def train(
    training: Training,
    *,
    prepared: Folder,
    mined: Folder | None,
    student: Folder,
    teacher: Folder | None,
    taught: Folder | None,
    joined: Folder | None = None,
    out: Folder,
) -> dict[str, Any]:
    """Runs one training; an earlier try that was cut off goes on from its last checkpoint.

    Args:
        training: what is trained, and how.
        prepared: folder of the prepare stage.
        mined: folder of the mining stage, where there is one before this stage.
        student: model folder that it starts from.
        teacher: model folder of a teacher that runs beside the student, when distilling from one.
        taught: folder of the teaching stage, when distilling from cached vectors; it has the stage's batches.
        joined: model folder of the teacher in whose space the student ends, where it has one.
        out: the stage's folder; it gets `batches/` (unless taught), `deepspeed.json`, `ray_train/` (checkpoints),
            `training.json` and `model/`.

    Returns:
        Facts for the manifest.

    Raises:
        F2LLMError: an error that another try would meet again, such as a loss of NaN or exits that the model does
            not have.
        ray.train.TrainingFailedError: workers were lost more often than `compute.max_failures`.
    """
    if joined is not None:
        training = replace(training, space=space_of(joined))
    job = _job(training, prepared, mined, student, teacher, taught, out)
    check_held_out(training, job.batches)
    _fit(job)
    facts: dict[str, Any] = out.read_json("training.json")
    if training.sets:
        facts["checkpoint_scores"] = out.read_json(SCORES_FILE) if out.exists(SCORES_FILE) else {}
    return {"training": facts}


def time_steps(
    training: Training,
    *,
    prepared: Folder,
    mined: Folder | None,
    student: Folder,
    teacher: Folder | None,
    out: Folder,
) -> dict[str, Any]:
    """Times some steps of a training and finds how many fit into its `max_minutes`.

    Args:
        training: the training, with `max_minutes`.
        prepared: folder of the prepare stage.
        mined: folder of the mining stage, where there is one before it.
        student: model folder that it starts from.
        teacher: model folder of a teacher that runs beside the student.
        out: the folder of this stage.

    Returns:
        Facts for the manifest: "pace", with the number of "steps" and what was timed.

    Raises:
        RunError: not one step fits.
        F2LLMError: an error that the training would meet, too.
    """
    settings = training.settings
    minutes = settings.max_minutes
    assert minutes is not None  # noqa: S101 - called because the stage has it
    trial = replace(training, settings=timed_settings(settings), sets={})
    _fit(_job(trial, prepared, mined, student, teacher, None, out, timed_seconds=60 * minutes * SHARE))
    facts: dict[str, Any] = out.read_json(PACE_FILE)
    pace = Pace(facts["step_seconds"], facts["validation_seconds"])
    steps = steps_in(minutes, pace, settings.checkpoint_every, stage=training.stage)
    say(
        f"{training.stage}: {formatting.plural(steps, 'step')} in {minutes:g} minutes, at "
        f"{pace.step_seconds:.3g} s a step and {pace.validation_seconds:.3g} s a validation; max_steps: {steps} "
        "makes the same model"
    )
    return {"pace": {"max_minutes": minutes, "steps": steps, **facts}}


def _job(
    training: Training,
    prepared: Folder,
    mined: Folder | None,
    student: Folder,
    teacher: Folder | None,
    taught: Folder | None,
    out: Folder,
    *,
    timed_seconds: float | None = None,
) -> TrainJob:
    """What the workers are given; the batches are written where they are not there."""
    check_exits(training, student)
    check_lora(training, student)
    if teacher is not None:
        check_online(prepared, teacher)
    ends = space_dims(training.settings, model=teacher, vectors=None if taught is None else taught / VECTORS)
    training = replace(training, prompts=read_prompts(prepared), ends=ends)
    if taught is None:
        write_batches(training, prepared=prepared, mined=mined, out=out / BATCHES)
    return TrainJob(
        training=training,
        student=student,
        teacher=teacher,
        taught=None if taught is None else taught / VECTORS,
        tokens=prepared / "tokens",
        batches=(taught or out) / BATCHES,
        out=out,
        timed_seconds=timed_seconds,
    )


def _fit(job: TrainJob) -> None:
    """Runs the workers to their end."""
    import ray.train
    import ray.train.torch

    settings, compute, out = job.training.settings, job.training.compute, job.out
    workers, gpus = compute.workers, compute.gpus_per_worker
    if out.exists(FAILURE):  # of an earlier try
        out.filesystem.delete_file(f"{out.path}/{FAILURE}")
    again = out.exists(CONFIG)
    out.write_json(CONFIG, deepspeed_config(settings, workers))
    settle(job.checkpoints, settings.keep_checkpoints)
    if again and job.timed_seconds is None and not listed(job.checkpoints):
        say(f"{job.label}: no checkpoint yet of the try before, starts from step 0")
    name_of_best, sign = BEST[settings.best_by]
    best = {"checkpoint_score_attribute": name_of_best, "checkpoint_score_order": "min" if sign > 0 else "max"}
    trainer = ray.train.torch.TorchTrainer(
        work,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers if compute.workers_min is None else (compute.workers_min, workers),
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": compute.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
        ),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=ray.train.RunConfig(
            name=RAY_TRAIN,
            storage_path=out.path,
            storage_filesystem=out.filesystem,
            # With a score, Ray Train keeps the best ones and the last.
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=settings.keep_checkpoints, **(best if settings.keep_best else {})
            ),
            failure_config=ray.train.FailureConfig(max_failures=compute.max_failures),
            callbacks=[_stopper()],
        ),
    )
    say(f"{job.label}: starts {formatting.plural(workers, 'worker')}")
    with watched(job):
        try:
            with interruptible(trainer):
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            found = plain_error(getattr(error, "controller_failure", error))
            raise (found or error) from None


def _stopper() -> Any:
    """A callback that ends a run on an error of ours, which another try would meet again.

    Ray Train retries after any error of a worker, but not after an error of a callback (ray 2.60).
    """
    from ray.train import UserCallback

    class Stopper(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            del run_context
            for error in worker_exceptions.values():
                # The error is inside a wrapper that carries its traceback.
                cause = getattr(error, "_base_exc", error)
                if isinstance(cause, F2LLMError):
                    raise cause

    return Stopper()
