"""Ctrl-C during a training: the error that Python makes of it, at once, and no worker that goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ABORT_SECONDS = 5.0
"""Most that is waited for the workers' end, so that whoever trains again meets none of them."""


@contextmanager
def interruptible(trainer: Any) -> Iterator[None]:
    """Around a Ray trainer's `fit`: Ctrl-C raises KeyboardInterrupt, and the workers are ended.

    Ray Train would set a handler of its own (ray 2.60), which says nothing, ends the process with an exit code of
    its own, and stays in place after the training. What would set it is handed the controller: this takes that.
    """
    import ray

    controllers = list[Any]()
    trainer._register_sigint_handler = controllers.append  # noqa: SLF001 - Ray has no setting for it
    try:
        yield
    except KeyboardInterrupt:
        for controller in controllers:  # one, or none where it had not started
            ray.wait([controller.abort.remote()], timeout=ABORT_SECONDS)
        raise
