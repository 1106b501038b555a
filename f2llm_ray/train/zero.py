"""DeepSpeed: the config that a recipe's stage stands for, and the learning-rate schedule."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from f2llm_ray.recipe import TrainStage

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine


def deepspeed_config(stage: TrainStage, world: int) -> dict[str, Any]:
    """The DeepSpeed config of a stage for a number of workers."""
    micro_batch = stage.global_batch // world
    return {
        "train_batch_size": stage.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": stage.clip,
        "bf16": {"enabled": stage.engine.precision == "bf16"},
        "zero_optimization": {
            "stage": stage.engine.zero_stage,
            **({"offload_optimizer": {"device": "cpu"}} if stage.engine.offload else {}),
        },
        # torch's AdamW is used as it is: DeepSpeed's own compiles a C++ op first, a minute on a fresh machine.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def start_engine(module: torch.nn.Module, stage: TrainStage, world: int) -> DeepSpeedEngine:
    """Makes the engine around a module, inside a worker whose process group is up."""
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for parameter in module.parameters():
        # Norm weights are scales around one; pulling them to zero is no regularisation.
        (decayed if parameter.ndim > 1 else plain).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=stage.lr,
        betas=stage.betas,
    )
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=deepspeed_config(stage, world), dist_init_required=False
    )
    return engine


def learning_rate(stage: TrainStage, step: int, steps: int) -> float:
    """Rate of a step (from 0): linear warm-up, then a cosine down to `min_lr` at the last step (paper)."""
    warmup = min(stage.warmup_steps, steps)
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    progress = (step - warmup) / max(steps - 1 - warmup, 1)
    return stage.min_lr + (stage.lr - stage.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def set_learning_rate(engine: DeepSpeedEngine, rate: float) -> None:
    """Sets the rate of the coming step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
