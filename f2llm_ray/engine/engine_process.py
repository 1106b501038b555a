"""A model whose engine runs in a process of its own, beside the one that answers HTTP.

In one process both take turns at Python's lock: torch asks for it after every operation, while the event loop
holds it to read and answer. With short texts the engine then stood still for a fifth of the time.

The other process is `python -m f2llm_ray.engine.engine_process FOLDER TOKENS_PER_PASS ENGINE`. When ready it
writes a line of JSON, `{"device", "engine"}` or `{"error"}`. A request is two uint32, n and the sum of lengths,
then the n lengths, then the token ids. An answer is two int32, n and d, then the vectors as float32; or -1 and a
size, then a message of that size. All little-endian. It ends when its input does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

import numpy as np

from f2llm_ray.base.errors import F2LLMError, RunError
from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine.names import EngineName
from f2llm_ray.engine.text_engine import TextEngine
from f2llm_ray.model.checkpoint import vocabulary_size
from f2llm_ray.model.dims import Vectors, cut_dims

FAILED = -1


class EngineProcess(TextEngine):
    """Tokenises here and embeds there; one thread at a time may embed. The folder is read before this returns.

    Raises:
        RunError: the folder is not a model folder, or its calibration is damaged.
    """

    def __init__(self, folder: Path, *, tokens_per_pass: int, engine: EngineName = "torch") -> None:
        super().__init__(folder)
        self.vocabulary = vocabulary_size(folder)
        self._process = subprocess.Popen(  # noqa: S603 (our own interpreter)
            [sys.executable, "-m", "f2llm_ray.engine.engine_process", str(folder), str(tokens_per_pass), engine],
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
        self.engine: str = ready["engine"]

    def embed_tokens(self, tokens: Sequence[Tokens], *, dim: int | None = None) -> Vectors:
        """Unit vectors [n, dim] (the whole d when unset) of token lists, in the given order.

        Raises:
            RuntimeError: the engine failed, and says how; or its process has ended, such as for want of memory.
        """
        try:
            write_tokens(self._requests, tokens)
            count, width = np.frombuffer(self._read(8), "<i4").tolist()
            if count == FAILED:
                raise RuntimeError(self._read(width).decode())
            vectors_nd = np.frombuffer(self._read(4 * count * width), "<f4").reshape(count, width)
        except (BrokenPipeError, EOFError):
            raise RuntimeError("the engine's process has ended") from None
        return vectors_nd if dim is None else cut_dims(vectors_nd, dim)

    def kill(self) -> None:
        """Ends the process, also one that hangs or is stopped; the engine is of no use after that."""
        self._process.kill()

    def _read(self, size: int) -> bytes:
        content = self._answers.read(size)
        if len(content) < size:
            raise EOFError
        return content


def main() -> None:
    """Answers until its input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    from f2llm_ray.engine.engine import Engine

    try:
        name = cast(EngineName, sys.argv[3])  # of the caller's own
        engine = Engine(Path(sys.argv[1]), tokens_per_pass=int(sys.argv[2]), engine=name)
    except F2LLMError as error:
        answers.write(json.dumps({"error": str(error)}).encode() + b"\n")
        answers.flush()
        return
    ready = {"device": engine.device, "engine": engine.engine}
    answers.write(json.dumps(ready).encode() + b"\n")
    answers.flush()
    while tokens := read_tokens(sys.stdin.buffer):
        try:
            vectors_nd = engine.embed_tokens(tokens)
        except Exception as error:  # noqa: BLE001 (the caller raises it)
            message = f"{type(error).__name__}: {error}".encode()
            answers.write(np.array([FAILED, len(message)], "<i4").tobytes() + message)
        else:
            answers.write(np.array(vectors_nd.shape, "<i4").tobytes())
            answers.write(np.ascontiguousarray(vectors_nd, "<f4").tobytes())
        answers.flush()


def write_tokens(stream: IO[bytes], tokens: Sequence[Tokens]) -> None:
    """Sends one request."""
    lengths = np.fromiter(map(len, tokens), "<u4", len(tokens))
    head = np.array([len(tokens), lengths.sum()], "<u4")
    stream.write(np.concatenate([head, lengths, *tokens]).astype("<u4", copy=False).tobytes())
    stream.flush()


def read_tokens(stream: IO[bytes]) -> list[Tokens]:
    """Takes one request; nothing where the input has ended."""
    head = stream.read(8)
    if len(head) < 8:
        return []
    count, total = np.frombuffer(head, "<u4").tolist()
    values = np.frombuffer(stream.read(4 * (count + total)), "<u4")
    if len(values) < count + total:
        return []
    return np.split(values[count:], np.cumsum(values[:count])[:-1])


if __name__ == "__main__":
    main()
