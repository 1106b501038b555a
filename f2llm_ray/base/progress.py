"""Progress of long work, as short lines on the terminal or in a job's log, and in Ray's metrics."""

from __future__ import annotations

import sys
import time
from functools import cache
from typing import Any


class Progress:
    """Prints how far a piece of work is, at most every few seconds.

    Args:
        label: what is being done.
        total: how many units it has.
        unit: their name.
        every: seconds between lines.
    """

    def __init__(self, label: str, total: int, unit: str, *, every: float = 5.0) -> None:
        self.label, self.total, self.unit, self.every = label, total, unit, every
        self.started = self.printed = time.monotonic()
        self.first: int | None = None
        self.last: int | None = None

    def update(self, done: int, *facts: str) -> None:
        """Says that `done` units are done, with further facts; prints when it is time to."""
        now = time.monotonic()
        if self.first is None:
            self.first = done
        early = now - self.printed < self.every and done < self.total
        if early or done == self.last:
            return
        self.last = done
        self.printed = now
        rate = (done - self.first) / max(now - self.started, 1e-9)
        if "ray" in sys.modules:
            done_share, per_second = _gauges()
            done_share.set(done / self.total if self.total else 1.0, {"work": self.label})
            per_second.set(rate, {"work": self.label, "unit": self.unit})
        left = [f"ETA {(self.total - done) / rate:.0f} s"] if rate > 0 and done < self.total else []
        say(", ".join([f"{self.label}: {done:,}/{self.total:,} {self.unit}", *facts, *left]))


@cache
def _gauges() -> tuple[Any, Any]:
    from ray.util.metrics import Gauge

    return (
        Gauge("f2llm_progress", "Share of the work that is done", ("work",)),
        Gauge("f2llm_progress_rate", "Units done per second", ("work", "unit")),
    )


def say(line: str) -> None:
    """Prints one line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
