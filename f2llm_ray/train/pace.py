"""How many steps of a stage fit into `max_minutes`: a few steps are timed on the machines that will train.

They are timed before the training, by workers of their own, and change no weight. So the training itself is one
with that many steps from its first step on: its learning rates and batches are those of the same stage with
`max_steps`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from f2llm_ray.base.errors import RunError
from f2llm_ray.train.settings import Distill, TrainStage

WARM, TIMED = 3, 20
"""Steps that are not timed, in which memory is claimed and code compiled, and the most that are."""
SHARE = 0.1
"""Of the stage's time, after which no further step is timed."""
PACE_FILE = "pace.json"


@dataclass(frozen=True)
class Pace:
    """Seconds of a step, all in, and of a validation."""

    step_seconds: float
    validation_seconds: float

    def seconds(self, steps: int, checkpoint_every: int) -> float:
        """Seconds of so many steps, with a validation at each checkpoint and at the end."""
        return steps * self.step_seconds + (1 + (steps - 1) // checkpoint_every) * self.validation_seconds


def steps_in(minutes: float, pace: Pace, checkpoint_every: int, *, stage: str) -> int:
    """The most steps that fit into so many minutes.

    Raises:
        RunError: not one does.
    """
    seconds = 60 * minutes
    if pace.seconds(1, checkpoint_every) > seconds:
        raise RunError(
            f"stage {stage!r}: max_minutes is {minutes:g}, but a step and a validation take "
            f"{pace.seconds(1, checkpoint_every):.1f} s here; allow more, or make global_batch or "
            "validation_rows smaller"
        )
    # Seconds grow with the steps, so the largest count that fits is found by halving.
    fits, too_many = 1, int(seconds / max(pace.step_seconds, 1e-9)) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if pace.seconds(middle, checkpoint_every) <= seconds:
            fits = middle
        else:
            too_many = middle
    return fits


def timed_settings(settings: TrainStage) -> TrainStage:
    """The stage's settings for steps that are timed: without the terms that need a cached teacher's vectors.

    Those vectors are computed for the batches of the training, whose number is not known yet; beside a step,
    comparing with them takes no time. At a rate of 0 no step can go astray.
    """
    changes: dict[str, Any] = {"max_steps": WARM + TIMED, "max_minutes": None, "lr": 0.0, "min_lr": 0.0}
    changes |= {"keep_best": False, "merge": None}
    if isinstance(settings, Distill) and settings.teacher_vectors == "cached":
        weights = ("mse_weight", "cosine_weight", "similarity_weight", "margin_weight")
        changes |= {**dict.fromkeys(weights, 0.0), "projection": False, "space": "own"}
    return settings.model_copy(update=changes)
