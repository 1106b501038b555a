"""Meters: what is seen of a stage while it runs, in the progress line, its record, Ray's metrics, TensorBoard."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

POINTS = 1024
"""Most points of a curve. When one has twice as many, each two neighbours become their mean."""
DECAY = 0.9
"""Weight of the past in running losses: they look back over about ten batches."""

Curve = list[tuple[int, float]]


class Meters:
    """Counts and curves of a stage. All but the times are the same whether a run was interrupted or not."""

    def __init__(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.strides: dict[str, int] = {}
        self.waiting: dict[str, list[float]] = {}
        self.running: dict[str, dict[str, float]] = {"sources": {}, "tasks": {}}
        self.last: dict[str, float] = {}
        self.tokens = 0
        self.seconds = 0.0
        self.waited = 0.0

    def record(self, step: int, *, source: str, task: str, tokens: int, values: Mapping[str, float]) -> None:
        """Takes the values of a finished step: "loss", and any others by name."""
        self.tokens += tokens
        self.last = dict(values)
        for name, value in values.items():
            self._add(name, step, value)
        for kind, name in (("sources", source), ("tasks", task)):
            before = self.running[kind].get(name, values["loss"])
            self.running[kind][name] = DECAY * before + (1 - DECAY) * values["loss"]

    def spent(self, *, seconds: float, waited: float) -> None:
        """Takes a step's whole time and the part of it that it waited for the loader."""
        self.seconds += seconds
        self.waited += waited

    def _add(self, name: str, step: int, value: float) -> None:
        curve = self.curves.setdefault(name, [])
        stride, waiting = self.strides.setdefault(name, 1), self.waiting.setdefault(name, [])
        waiting.append(value)
        if len(waiting) < stride:
            return
        curve.append((step, _short(sum(waiting) / stride)))
        waiting.clear()
        if len(curve) == 2 * POINTS:
            self.strides[name] = 2 * stride
            pairs = zip(curve[::2], curve[1::2], strict=True)
            self.curves[name] = [(later, _short((a + b) / 2)) for (_, a), (later, b) in pairs]

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second of all ranks, since the stage began."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def stall(self) -> float:
        """Share of the time that was spent waiting for the loader."""
        return self.waited / max(self.seconds, 1e-9)

    def state(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return dict(vars(self))

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        vars(self).update(state)
        self.curves = {name: [(step, value) for step, value in curve] for name, curve in self.curves.items()}

    def line(self) -> list[str]:
        """The facts of a progress line."""
        tasks = self.running["tasks"]
        by_task = f" ({', '.join(f'{task} {loss:.3f}' for task, loss in tasks.items())})" if len(tasks) > 1 else ""
        return [
            f"loss {self.last['loss']:.4f}{by_task}",
            f"gradient {self.last['gradient_norm']:.3g}",
            f"rate {self.last['learning_rate']:.2e}",
            f"{self.tokens_per_second:,.0f} tokens/s",
            f"loader stall {self.stall:.1%}",
        ]

    def summary(self) -> dict[str, Any]:
        """What `training.json` says; curves are pairs of step and value."""
        return {
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "loader_stall": round(self.stall, 4),
            "final_loss": _short(self.last["loss"]) if self.last else None,
            "source_loss": {name: _short(loss) for name, loss in self.running["sources"].items()},
            "task_loss": {name: _short(loss) for name, loss in self.running["tasks"].items()},
            **self.curves,
        }


def _short(value: float) -> float:
    return float(f"{value:.7g}")


class Displays:
    """Ray's metrics (dashboard, Prometheus) and, where it is installed, TensorBoard; of the first worker."""

    def __init__(self, stage: str, folder: Path | None, first: int) -> None:
        """Opens them.

        Args:
            stage: name of the stage, a tag of the metrics.
            folder: a local folder for TensorBoard's files; None for a run in an object store, which has none.
            first: step that the run goes on from; what TensorBoard has of later ones is replaced.
        """
        from ray.util.metrics import Gauge

        self.stage = stage
        self.gauges = {
            name: Gauge(f"f2llm_train_{name}", description, tag_keys=("stage", *tags))
            for name, description, tags in (
                ("loss", "Running loss of a source", ("source",)),
                ("tokens_per_second", "Real tokens per second of all workers", ()),
                ("gradient_norm", "Norm of the gradient before clipping", ()),
                ("learning_rate", "Learning rate", ()),
                ("loader_stall", "Share of the time spent waiting for the loader", ()),
            )
        }
        self.writer: Any = None
        if folder is not None and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=first + 1)
        self.shown = 0.0

    def show(self, step: int, source: str, meters: Meters) -> None:
        """Shows a step; the gauges at most once a second, since they are scraped less often."""
        if self.writer is not None:
            for name, value in meters.last.items():
                self.writer.add_scalar(name, value, step)
            self.writer.add_scalar(f"source_loss/{source}", meters.running["sources"][source], step)
        if time.monotonic() - self.shown < 1:
            return
        self.shown = time.monotonic()
        tags = {"stage": self.stage}
        for name, loss in meters.running["sources"].items():
            self.gauges["loss"].set(loss, {**tags, "source": name})
        for name in ("gradient_norm", "learning_rate"):
            self.gauges[name].set(meters.last[name], tags)
        self.gauges["tokens_per_second"].set(meters.tokens_per_second, tags)
        self.gauges["loader_stall"].set(meters.stall, tags)

    def close(self) -> None:
        """Writes out what is held back."""
        if self.writer is not None:
            self.writer.close()
