"""Settings of the cluster: what every step that runs a model may use of it."""

from __future__ import annotations

from pydantic import Field, model_validator

from f2llm_ray.base.section import Neutral, Section
from f2llm_ray.engine.names import EngineName


class Compute(Section):
    """What the run asks of the cluster."""

    workers: Neutral[int] = Field(default=1, ge=1)
    """World size of training."""
    workers_min: Neutral[int | None] = Field(default=None, ge=1)
    """Elastic training: goes on with this many workers or more, up to `workers`, as nodes come and go; each change
    starts again from the last checkpoint."""
    cpus_per_worker: Neutral[float] = Field(default=1.0, gt=0)
    """CPUs that Ray books for each worker."""
    gpus_per_worker: Neutral[float] = Field(default=0.0, ge=0)
    """GPUs that Ray books for each worker; 0 trains on CPU."""
    threads_per_worker: Neutral[int] = Field(default=1, ge=1)
    """Torch threads of a worker on CPU."""
    engine: Neutral[EngineName] = "torch"
    """What computes the vectors of a run's own steps outside training: evaluation, mining, cached teachers.
    `torch`; `onnx` or `openvino`, on CPU; or `auto`, which takes the files of those where they are there and makes
    none."""
    max_failures: Neutral[int] = Field(default=3, ge=0)
    """Times a stage goes on from its last checkpoint after losing a worker."""

    @property
    def per_worker(self) -> dict[str, float]:
        """CPUs and GPUs of one worker, as Ray's options name them."""
        return {"num_cpus": self.cpus_per_worker, "num_gpus": self.gpus_per_worker}

    @model_validator(mode="after")
    def _elastic(self) -> Compute:
        if self.workers_min is not None and self.workers_min > self.workers:
            raise ValueError(f"workers_min ({self.workers_min}) must not exceed workers ({self.workers})")
        return self
