"""The engine in a process of its own: `python -m f2llm_ray.engine.engine_process_main FOLDER TOKENS_PER_PASS`.

It writes one line of JSON when it is ready, `{"device", "vocabulary"}` or `{"error"}`. A request is two uint32, n
and the sum of lengths, then the n lengths, then the token ids. An answer is two int32, n and d, then the vectors
as float32; or -1 and a size, then a message of that size. All little-endian. It ends when its input does.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from f2llm_ray.base.errors import F2LLMError
from f2llm_ray.data.tokens.store import Tokens

FAILED = -1


def main() -> None:
    """Answers until its input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    from f2llm_ray.engine.engine import Engine

    try:
        engine = Engine(Path(sys.argv[1]), tokens_per_pass=int(sys.argv[2]))
    except F2LLMError as error:
        answers.write(json.dumps({"error": str(error)}).encode() + b"\n")
        answers.flush()
        return
    ready = {"device": engine.device, "vocabulary": int(engine.backbone.config.vocab_size)}
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
