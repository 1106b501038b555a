"""The engine of a replica, watched: one that is broken or hangs ends its replica, and Serve starts another.

A CUDA error breaks a process for good: each pass after it fails, fast, and a balancer that counts open requests
would send most of them there. A text that is too long for the memory fails alone. A text that is known to work
tells the two apart.

Shapes: n texts, d dims.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np

from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine.engine_process import EngineProcess
from f2llm_ray.engine.text_engine import WORST
from f2llm_ray.model.dims import Vectors

PROBE = "ready"
"""A short text that every tokenizer has tokens for."""


class WatchedEngine:
    """Embeds with an engine in a process of its own, and checks after an error that it still can.

    Args:
        engine: it embeds the probe once here, so that it is ready.
        leave: called with the reason where the engine is of no use any more; it does not return on a replica.
    """

    def __init__(self, engine: EngineProcess, leave: Callable[[str], None]) -> None:
        self._engine, self._leave, self._leaving = engine, leave, False
        self.probe = engine.tokenize([PROBE])
        self._known_1d = engine.embed_tokens(self.probe)

    def embed_tokens(self, tokens: Sequence[Tokens]) -> Vectors:
        """Unit vectors [n, d] of token lists.

        Raises:
            RuntimeError: these texts failed, or have vectors that are not finite.
        """
        try:
            return finite(self._engine.embed_tokens(tokens))
        except Exception as error:
            problem = self._problem()
            if problem:
                self.leave(f"{error}; after that, {problem}")
            raise

    def leave(self, reason: str) -> None:
        """Ends the engine's process, which may hang, and then this replica, for the first reason that there is."""
        if self._leaving:
            return
        self._leaving = True
        self._engine.kill()
        self._leave(reason)

    def _problem(self) -> str | None:
        """What is wrong with the vector of the probe."""
        try:
            found_1d = finite(self._engine.embed_tokens(self.probe))
        except Exception as error:  # noqa: BLE001 (whatever it is, the engine is broken)
            return f"a text that is known to work: {error}"
        off = 1 - float(np.sum(found_1d * self._known_1d))
        return None if off <= WORST else f"the vector of a known text was {off:.2g} away (1 - cosine)"


def finite(vectors_nd: Vectors) -> Vectors:
    """The vectors [n, d] as they are.

    Raises:
        RuntimeError: one holds NaN or infinity, which no client could tell from a vector.
    """
    if not np.isfinite(vectors_nd).all():
        raise RuntimeError("the engine gave vectors with NaN or infinity")
    return vectors_nd


def end_process(reason: str) -> None:
    """Ends this replica at once: Serve replaces it, and HAProxy sends its requests to another one."""
    os.write(2, f"this replica ends: {reason}\n".encode())
    os._exit(1)
