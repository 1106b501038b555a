"""A model whose engine runs in a process of its own, beside the one that answers HTTP.

In one process both take turns at Python's lock: torch asks for it after every operation, while the event loop
holds it to read and answer. With short texts the engine then stood still for a fifth of the time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine import engine_process_main
from f2llm_ray.engine.text_engine import TextEngine
from f2llm_ray.model.dims import Vectors


class EngineProcess(TextEngine):
    """Tokenises here and embeds there; one thread at a time may embed.

    Args:
        folder: the model; read before this returns.
        tokens_per_pass: as in `Engine`.
        gone: called where the process has ended by itself, such as by the system for want of memory.

    Raises:
        RunError: the folder is not a model folder, or its calibration is damaged.
    """

    def __init__(self, folder: Path, *, tokens_per_pass: int, gone: Callable[[], None]) -> None:
        super().__init__(folder)
        self._gone = gone
        self._process = subprocess.Popen(  # noqa: S603 (our own interpreter)
            [sys.executable, "-m", engine_process_main.__name__, str(folder), str(tokens_per_pass)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ray has put the code that a job ships onto this process's path only.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self._process.stdin is not None  # noqa: S101 (for the type: they are pipes)
        assert self._process.stdout is not None  # noqa: S101
        self._requests, self._answers = self._process.stdin, self._process.stdout
        line = self._answers.readline()
        if not line:
            raise RunError(f"{folder}: the engine's process ended with code {self._process.wait()} as it started")
        ready = json.loads(line)
        if "error" in ready:
            raise RunError(ready["error"])
        self.device: str = ready["device"]
        self.vocabulary: int = ready["vocabulary"]

    def embed_tokens(self, tokens: Sequence[Tokens], *, dim: int | None = None) -> Vectors:
        """Unit vectors [n, dim] (the whole d when unset) of token lists, in the given order.

        Raises:
            RuntimeError: the engine failed, and says how.
        """
        try:
            engine_process_main.write_tokens(self._requests, tokens)
            count, width = np.frombuffer(self._read(8), "<i4").tolist()
            if count == engine_process_main.FAILED:
                raise RuntimeError(self._read(width).decode())
            vectors_nd = np.frombuffer(self._read(4 * count * width), "<f4").reshape(count, width)
        except (BrokenPipeError, EOFError):
            self._gone()
            raise RuntimeError("the engine's process has ended") from None
        if dim is None or dim == width:
            return vectors_nd
        cut_nk = vectors_nd[:, :dim]
        return cut_nk / np.linalg.norm(cut_nk, axis=1, keepdims=True)

    def _read(self, size: int) -> bytes:
        content = self._answers.read(size)
        if len(content) < size:
            raise EOFError
        return content
