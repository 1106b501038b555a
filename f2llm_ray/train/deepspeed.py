"""DeepSpeed: the config of a stage, the learning rate, and reading and writing the engine's state."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from f2llm_ray.engine.attention import use_varlen
from f2llm_ray.model.families import family_of
from f2llm_ray.train.settings import TrainStage

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
    """Makes the engine of a module with a `backbone`, in a worker whose process group is initialised."""
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # DeepSpeed would compile an all-reduce for inference on CPU, which training has no use for: a minute on the
    # first run, and a run killed meanwhile leaves a lock for which every later one waits without end.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backbone: Any = module.backbone
    if not torch.cuda.is_available():
        use_varlen(backbone)
    if stage.engine.compile:
        for layer in family_of(backbone.config).layers_of(backbone):  # in place: names of weights stay
            layer.compile(dynamic=True)
    if stage.freeze_embeddings:
        backbone.get_input_embeddings().requires_grad_(False)
    parameters = [parameter for _, parameter in trained(module)]
    decayed = [p for p in parameters if p.ndim > 1]
    # Norm weights are scales around one; pulling them to zero is no regularisation.
    plain = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    # LoRA's are all matrices, and DeepSpeed takes no empty group.
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=deepspeed_config(stage, world), dist_init_required=False
    )
    return engine


def trained(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that training moves, by name; `freeze_embeddings` and `lora` leave some out."""
    return [(name, value) for name, value in module.named_parameters() if value.requires_grad]


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


def step(engine: DeepSpeedEngine) -> float:
    """Does the optimizer's step and returns the gradient's norm over all ranks, before clipping.

    The norm is infinite or NaN where the gradient is.
    """
    import torch

    norm: Any = None
    if engine.zero_optimization_stage() == 0:  # without ZeRO the engine clips by a norm that it does not keep
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    norm = engine.get_global_grad_norm() if norm is None else norm
    return math.nan if norm is None else float(norm)


def link_moments(engine: DeepSpeedEngine) -> None:
    """Makes the moments of all parameters readable, after the optimizer's first step.

    ZeRO 1 and 2 do that after the step of their first group of parameters, before the moments of the second group
    exist (deepspeed 0.19.8).
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    zero = engine.optimizer
    if hasattr(zero, "single_partition_of_fp32_groups"):
        for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, flat, zero.optimizer.state)


def read_state(engine: DeepSpeedEngine, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
    """The whole float32 "weight" of a parameter, or a moment by its name in torch; every rank must call it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        return parameter.data if kind == "weight" else engine.optimizer.state[parameter][kind]
    if kind == "weight":
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


def write_state(engine: DeepSpeedEngine, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
    """Writes the tensor that `read_state` reads; for a weight, also the copy that the model computes with."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    value = value.to(engine.device)
    zero_stage = engine.zero_optimization_stage()
    if kind == "weight":
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=zero_stage == 3):
            parameter.data.copy_(value)
        if zero_stage > 0:
            safe_set_full_fp32_param(parameter, value)
    elif zero_stage > 0:
        safe_set_full_optimizer_state(parameter, value, kind)
    else:
        engine.optimizer.state[parameter][kind].copy_(value)
