"""Shuffle files: rows of numbers on their way to the task of their shard.

A task that makes rows writes one file, sorted by shard; the task of a shard reads its stretch of every file.
Nothing is held in memory in between, a file that is there need not be written again, and the order of files is the
order of rows: the result does not depend on which task was first.

Shapes: n rows, w numbers of each, s shards.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from f2llm_ray.run.folder import Folder

Rows = np.ndarray[Any, np.dtype[np.uint64]]
SUFFIX = ".rows"


def write_rows(folder: Folder, name: str, rows: Rows, shard: np.ndarray[Any, Any], shards: int) -> None:
    """Writes rows [n, w] of one task with the shard [n] of each, whole or not at all.

    Files, whose names come without suffix, are read in the order of their names.
    """
    # Sorting 16-bit numbers is a radix sort: 20 times as fast as one of 64 bits.
    order = np.argsort(shard.astype(np.uint16), kind="stable")
    ends = np.cumsum(np.bincount(shard, minlength=shards))
    head = np.array([rows.shape[1], 0, *ends], dtype="<u8")
    folder.write_bytes(f"{name}{SUFFIX}", head.tobytes() + np.ascontiguousarray(rows[order], "<u8").tobytes())


def read_shard(folder: Folder, shard: int, shards: int, width: int) -> Rows:
    """The rows [n, w] of one shard, file after file."""
    head_bytes = 8 * (shards + 2)
    found = [np.empty((0, width), np.uint64)]
    for name in folder.files(SUFFIX):
        with folder.filesystem.open_input_file(f"{folder.path}/{name}") as file:
            head = np.frombuffer(file.read(head_bytes), "<u8").astype(np.int64)
            first, last = head[shard + 1], head[shard + 2]
            file.seek(head_bytes + 8 * width * int(first))
            data = file.read(8 * width * int(last - first))
        found.append(np.frombuffer(data, "<u8").reshape(-1, width))
    return np.concatenate(found)
