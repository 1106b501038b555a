"""The progress board: a small actor where the first worker says how far it is, and the driver reads it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from f2llm_ray.progress import Progress, say

SECONDS = 1.0


class _Board:
    def __init__(self) -> None:
        self.facts: dict[str, Any] | None = None

    def post(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    def read(self) -> dict[str, Any] | None:
        return self.facts


def post(run_id: str, **facts: Any) -> None:
    """Says how far a run is, without waiting for anyone."""
    import ray

    ray.get_actor(run_id, namespace="f2llm").post.remote(facts)


@contextmanager
def watched(run_id: str, label: str) -> Iterator[None]:
    """Prints a run's progress from the driver for as long as the context lasts."""
    import ray

    board = ray.remote(num_cpus=0)(_Board).options(name=run_id, namespace="f2llm", get_if_exists=True).remote()
    stop = threading.Event()

    def watch() -> None:
        progress: Progress | None = None
        told: str | None = None
        while not stop.wait(SECONDS):
            facts = ray.get(board.read.remote())
            if facts is None:
                continue
            if "error" in facts:
                if facts["error"] != told:
                    told = facts["error"]
                    say(f"{label}: {told}")
                continue
            if progress is None:
                progress = Progress(label, facts["steps"], "steps")
                if facts["first"]:
                    say(f"{label}: goes on from step {facts['first']:,}")
            progress.update(
                facts["step"],
                f"loss {facts['loss']:.4f}",
                f"{facts['tokens_per_second']:,.0f} tokens/s",
                f"loader stall {facts['stall']:.1%}",
            )

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        ray.kill(board)
