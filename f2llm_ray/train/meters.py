"""Meters: what is counted of a stage while it runs, for the progress line, its record and the displays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from f2llm_ray.train.validation import HeldOut

POINTS = 1024
"""Most points of a curve. When one has twice as many, each two neighbours become their mean."""
DECAY = 0.9
"""Weight of the past in running losses: they look back over about ten batches."""

Curve = list[tuple[int, float]]
HELD_OUT = ("validation", "score")
"""What is found on held-out rows: the loss, and nDCG@10."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One global batch of a step, over all ranks."""

    source: str
    task: str
    loss: float
    tokens: int
    """Real tokens."""
    positions: int
    """Tokens and the padding that was computed with them."""
    flops: float


class Meters:
    """Counts and curves of a stage. All but the times are the same whether a run was interrupted or not."""

    def __init__(self, peak_flops_per_second: float | None = None) -> None:
        """Starts at nothing.

        Args:
            peak_flops_per_second: what all ranks' GPUs could do; without it there is no MFU.
        """
        self.peak = peak_flops_per_second
        self.curves: dict[str, Curve] = {}
        self.strides: dict[str, int] = {}
        self.waiting: dict[str, list[float]] = {}
        self.running: dict[str, dict[str, float]] = {"sources": {}, "tasks": {}}
        self.last: dict[str, float] = {}
        self.sources: list[str] = []
        self.held_out: dict[str, Curve] = {name: [] for name in HELD_OUT}
        self.tokens = 0
        self.positions = 0
        self.flops = 0.0
        self.seconds = 0.0
        self.waited = 0.0
        self.validated = 0.0

    def record(self, step: int, batches: Sequence[Seen], values: Mapping[str, float]) -> None:
        """Takes the batches of a finished step and its values: "loss", and any others by name."""
        self.last = dict(values)
        self.sources = [batch.source for batch in batches]
        for name, value in values.items():
            self._add(name, step, value)
        for batch in batches:
            self.tokens += batch.tokens
            self.positions += batch.positions
            self.flops += batch.flops
            for kind, name in (("sources", batch.source), ("tasks", batch.task)):
                before = self.running[kind].get(name, batch.loss)
                self.running[kind][name] = DECAY * before + (1 - DECAY) * batch.loss

    def spent(self, *, seconds: float, waited: float) -> None:
        """Takes a step's whole time and the part of it that it waited for the loader."""
        self.seconds += seconds
        self.waited += waited

    def validation(self, step: int, found: HeldOut | None, seconds: float) -> None:
        """Takes what a validation after a step found, and the time that training stood still for it."""
        self.validated += seconds
        if found is None:
            return
        self.held_out["validation"].append((step, round(found.loss, 6)))
        if found.score is not None:
            self.held_out["score"].append((step, round(found.score, 6)))

    def last_held_out(self, name: str) -> float | None:
        """The latest validation loss ("validation") or nDCG@10 ("score"), None without any."""
        return self.held_out[name][-1][1] if self.held_out[name] else None

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

    @property
    def padding(self) -> float:
        """Share of the computed positions that was padding."""
        return 1 - self.tokens / max(self.positions, 1)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: share of the GPUs' peak that the model's FLOPs took; None without a peak."""
        return None if self.peak is None else self.flops / max(self.seconds, 1e-9) / self.peak

    def state(self) -> dict[str, Any]:
        """All of it but the peak, which is the machine's, as JSON values."""
        return {name: value for name, value in vars(self).items() if name != "peak"}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        vars(self).update(state)
        self.curves, self.held_out = _pairs(self.curves), _pairs(self.held_out)

    def line(self) -> list[str]:
        """The facts of a progress line."""
        tasks = self.running["tasks"]
        by_task = f" ({', '.join(f'{task} {loss:.3f}' for task, loss in tasks.items())})" if len(tasks) > 1 else ""
        names = {"validation": "validation", "score": "nDCG@10"}
        held_out = [f"{names[name]} {curve[-1][1]:.4f}" for name, curve in self.held_out.items() if curve]
        return [
            f"loss {self.last['loss']:.4f}{by_task}",
            *held_out,
            f"gradient {self.last['gradient_norm']:.3g}",
            f"rate {self.last['learning_rate']:.2e}",
            f"{self.tokens_per_second:,.0f} tokens/s",
            *([] if self.mfu is None else [f"MFU {self.mfu:.1%}"]),
            f"loader stall {self.stall:.1%}",
        ]

    def summary(self) -> dict[str, Any]:
        """What `training.json` says; curves are pairs of step and value."""
        return {
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "loader_stall": round(self.stall, 4),
            "padding_share": round(self.padding, 4),
            "mfu": None if self.mfu is None else round(self.mfu, 4),
            "validation_seconds": round(self.validated, 2),
            "final_loss": _short(self.last["loss"]) if self.last else None,
            "source_loss": {name: _short(loss) for name, loss in self.running["sources"].items()},
            "task_loss": {name: _short(loss) for name, loss in self.running["tasks"].items()},
            **self.curves,
            **self.held_out,
        }


def _pairs(curves: Mapping[str, Sequence[Sequence[Any]]]) -> dict[str, Curve]:
    return {name: [(step, value) for step, value in curve] for name, curve in curves.items()}


def _short(value: float) -> float:
    return float(f"{value:.7g}")
