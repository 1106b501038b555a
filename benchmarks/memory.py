"""Memory of this process and all below it, sampled while work runs."""

from __future__ import annotations

import threading

import psutil
from typing_extensions import Self

EVERY = 0.25
"""Seconds between samples."""


class Peak:
    """Largest sum of proportional set sizes in MB: what processes share is counted once."""

    def __enter__(self) -> Self:
        self.mb = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        here = psutil.Process()
        while not self._done.wait(EVERY):
            self.mb = max(self.mb, sum(map(_pss, [here, *here.children(recursive=True)])) / 2**20)


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it has just ended
        return 0
