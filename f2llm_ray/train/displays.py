"""Displays: where the first worker shows a running stage, as Ray's metrics and in trackers."""

from __future__ import annotations

import time
from collections.abc import Sequence

from f2llm_ray.train.meters import Meters
from f2llm_ray.train.trackers import Tracker

GAUGES = {
    "loss": "Running loss of a source",
    "validation_loss": "Loss on held-out rows at the last checkpoint",
    "validation_ndcg10": "nDCG@10 on held-out retrieval rows at the last checkpoint",
    "step": "Optimizer steps done",
    "tokens_per_second": "Real tokens per second of all workers",
    "gradient_norm": "Norm of the gradient before clipping",
    "learning_rate": "Learning rate",
    "loader_stall": "Share of the time spent waiting for the loader",
    "padding_share": "Share of the computed positions that was padding",
    "mfu": "Model FLOPs utilisation of the GPUs",
}
"""Ray's metrics, `f2llm_train_<name>`; all carry the label stage, the loss also source (docs/training.md)."""


class Displays:
    """Ray's metrics (dashboard, Prometheus) and trackers."""

    def __init__(self, stage: str, trackers: Sequence[Tracker]) -> None:
        """Opens them.

        Args:
            stage: name of the stage, a label of the metrics.
            trackers: get every step and every validation.
        """
        from ray.util.metrics import Gauge

        self.stage, self.trackers, self.shown = stage, trackers, 0.0
        self.gauges = {
            name: Gauge(
                f"f2llm_train_{name}", said, tag_keys=("stage", "source") if name == "loss" else ("stage",)
            )
            for name, said in GAUGES.items()
        }

    def show(self, step: int, meters: Meters) -> None:
        """Shows the last step; the gauges at most once a second, as often as they are read."""
        losses = meters.running["sources"]
        self._track(
            {**meters.last, **{f"source_loss/{source}": losses[source] for source in meters.sources}}, step
        )
        if time.monotonic() - self.shown < 1:
            return
        self.shown = time.monotonic()
        for source, loss in losses.items():
            self.gauges["loss"].set(loss, {"stage": self.stage, "source": source})
        self._set("step", step)
        for name in ("gradient_norm", "learning_rate"):
            self._set(name, meters.last[name])
        self._set("tokens_per_second", meters.tokens_per_second)
        self._set("loader_stall", meters.stall)
        self._set("padding_share", meters.padding)
        self._set("mfu", meters.mfu)

    def show_held_out(self, step: int, meters: Meters) -> None:
        """Shows what a validation after a step found."""
        found = {
            "validation_loss": meters.last_held_out("validation"),
            "validation_ndcg10": meters.last_held_out("score"),
        }
        for name, value in found.items():
            self._set(name, value)
        self._track({name: value for name, value in found.items() if value is not None}, step)

    def close(self) -> None:
        """Writes out what is held back."""
        for tracker in self.trackers:
            tracker.close()

    def _set(self, name: str, value: float | None) -> None:
        if value is not None:
            self.gauges[name].set(value, {"stage": self.stage})

    def _track(self, values: dict[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(values, step)
