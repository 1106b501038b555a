"""What is counted of a training while it runs: for the progress line, for trackers and for `training.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from f2llm_ray.train.step import Done
    from f2llm_ray.train.validation import HeldOut

POINTS = 1024
"""Most points of a curve. When one has twice as many, each two neighbours become their mean."""
DECAY = 0.9
"""Weight of the past in running losses: they look back over about ten batches."""
HELD_OUT = {"validation": "validation_loss", "score": "validation_ndcg10"}
"""The two curves on held-out rows, loss and nDCG@10, and their names in trackers."""

Curve = list[list[float]]
"""Points [step, value], as JSON has them."""


class TrainingMeters:
    """Counts and curves of a training. All but the times are the same whether it was interrupted or not.

    Args:
        peak_flops_per_second: peak of all ranks' GPUs together; without it there is no MFU.
    """

    def __init__(self, peak_flops_per_second: float | None = None) -> None:
        self.peak = peak_flops_per_second
        self.curves: dict[str, Curve] = {name: [] for name in HELD_OUT}
        self.stride, self.waiting = 1, list[Mapping[str, float]]()
        self.running: dict[str, dict[str, float]] = {"source_loss": {}, "task_loss": {}}
        self.last: dict[str, float] = {}
        self.tokens = self.positions = 0
        self.flops = self.seconds = self.waited = self.validated = 0.0

    def record(self, step: int, done: Done, *, rate: float, seconds: float) -> None:
        """Adds a finished step, its learning rate and its duration; every step has values of the same names."""
        self.seconds += seconds
        self.waited += done.waited
        for batch in done.batches:
            self.tokens += batch.tokens
            self.positions += batch.positions
            self.flops += batch.flops
            for kind, name in (("source_loss", batch.source), ("task_loss", batch.task)):
                before = self.running[kind].get(name, batch.loss)
                self.running[kind][name] = DECAY * before + (1 - DECAY) * batch.loss
        self.last = values = {**done.values, "learning_rate": rate}
        self.waiting.append(values)
        if len(self.waiting) < self.stride:
            return
        for name in values:
            mean = sum(each[name] for each in self.waiting) / self.stride
            self.curves.setdefault(name, []).append([step, _short(mean)])
        self.waiting = []
        if len(self.curves["loss"]) == 2 * POINTS:
            self.stride *= 2
            for name in values:
                pairs = zip(self.curves[name][::2], self.curves[name][1::2], strict=True)
                self.curves[name] = [[later, _short((a + b) / 2)] for (_, a), (later, b) in pairs]

    def validation(self, step: int, found: HeldOut | None, seconds: float) -> None:
        """Adds the result of a validation after a step, and the time that training stood still for it."""
        self.validated += seconds
        values = {} if found is None else {"validation": found.loss, "score": found.score}
        for name, value in values.items():
            if value is not None:
                self.curves[name].append([step, round(value, 6)])

    def held_out(self) -> dict[str, float | None]:
        """The latest validation loss ("validation") and nDCG@10 ("score"), None where there is none."""
        return {name: self.curves[name][-1][1] if self.curves[name] else None for name in HELD_OUT}

    def rates(self) -> dict[str, float]:
        """Tokens per second of all ranks since the stage began, and shares, as `trackers.GAUGES` explains them."""
        seconds = max(self.seconds, 1e-9)
        return {
            "tokens_per_second": self.tokens / seconds,
            "loader_stall": self.waited / seconds,
            "padding_share": 1 - self.tokens / max(self.positions, 1),
            **({} if self.peak is None else {"mfu": self.flops / seconds / self.peak}),
        }

    def state(self) -> dict[str, Any]:
        """All of it as JSON values, but for the peak, which is the machine's."""
        return {name: value for name, value in vars(self).items() if name != "peak"}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        vars(self).update(state)

    def line(self) -> list[str]:
        """The facts of a progress line."""
        tasks, rates, held_out = self.running["task_loss"], self.rates(), self.held_out()
        by_task = f" ({', '.join(f'{task} {loss:.3f}' for task, loss in tasks.items())})" if len(tasks) > 1 else ""
        shown = {"validation": held_out["validation"], "nDCG@10": held_out["score"]}
        return [
            f"loss {self.last['loss']:.4f}{by_task}",
            *(f"{name} {value:.4f}" for name, value in shown.items() if value is not None),
            f"gradient {self.last['gradient_norm']:.3g}",
            f"rate {self.last['learning_rate']:.2e}",
            f"{rates['tokens_per_second']:,.0f} tokens/s",
            *([f"MFU {rates['mfu']:.1%}"] if "mfu" in rates else []),
            f"loader stall {rates['loader_stall']:.1%}",
        ]

    def summary(self) -> dict[str, Any]:
        """The content of `training.json`; curves are lists of [step, value]."""
        running = {kind: {name: _short(x) for name, x in losses.items()} for kind, losses in self.running.items()}
        return {
            "tokens": self.tokens,
            "mfu": None,
            **{name: round(rate, 1 if name == "tokens_per_second" else 4) for name, rate in self.rates().items()},
            "validation_seconds": round(self.validated, 2),
            "final_loss": _short(self.last["loss"]) if self.last else None,
            **running,
            **self.curves,
        }


def _short(value: float) -> float:
    return float(f"{value:.7g}")
