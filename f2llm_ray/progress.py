"""Progress of long work, as short lines on the terminal or in a job's log."""

from __future__ import annotations

import sys
import time


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
        left = [f"ETA {(self.total - done) / rate:.0f} s"] if rate > 0 and done < self.total else []
        say(", ".join([f"{self.label}: {done:,}/{self.total:,} {self.unit}", *facts, *left]))


def say(line: str) -> None:
    """Prints one line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
