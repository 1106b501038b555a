"""The progress board: a small actor where workers say how far they are, and the driver reads it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from f2llm_ray.base.progress import Progress, say

SECONDS = 1.0


class _Board:
    def __init__(self) -> None:
        self.facts: dict[str, Any] | None = None
        self.lines: list[str] = []

    def post(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    def tell(self, line: str) -> None:
        if line not in self.lines[-1:]:
            self.lines.append(line)

    def read(self, seen: int) -> tuple[dict[str, Any] | None, list[str]]:
        return self.facts, self.lines[seen:]


def post(run_id: str, **facts: Any) -> None:
    """Says how far a run is, without waiting for anyone."""
    _board(run_id).post.remote(facts)


def tell(run_id: str, line: str) -> None:
    """Has the driver print a line; one that repeats the last is dropped."""
    import ray

    ray.get(_board(run_id).tell.remote(line))


def _board(run_id: str) -> Any:
    import ray

    return ray.get_actor(run_id, namespace="f2llm")


class _Watch:
    """What the driver has printed of a board."""

    def __init__(self, label: str) -> None:
        self.label, self.seen = label, 0
        self.first: int | None = None
        self.progress: Progress | None = None

    def show(self, facts: dict[str, Any] | None, lines: list[str]) -> None:
        for line in lines:
            say(f"{self.label}: {line}")
        self.seen += len(lines)
        if facts is None:
            return
        if self.progress is None or self.first != facts["first"]:
            self.first, self.progress = facts["first"], Progress(self.label, facts["steps"], "steps")
            if self.first:
                say(f"{self.label}: goes on from step {self.first:,}")
        self.progress.update(facts["step"], *facts["line"])


@contextmanager
def watched(run_id: str, label: str) -> Iterator[None]:
    """Prints a run's progress from the driver for as long as the context lasts."""
    import ray

    board = ray.remote(num_cpus=0)(_Board).options(name=run_id, namespace="f2llm", get_if_exists=True).remote()
    stop = threading.Event()
    watch = _Watch(label)

    def follow() -> None:
        while not stop.wait(SECONDS):
            watch.show(*ray.get(board.read.remote(watch.seen)))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        watch.show(*ray.get(board.read.remote(watch.seen)))
        ray.kill(board)
