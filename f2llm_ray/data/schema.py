"""What a row is, and what the id of a text is: the contract every data step keeps."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

Task = Literal["retrieval", "classification", "clustering"]
TASKS: tuple[Task, ...] = get_args(Task)

KEY_BYTES = 16
KEY = pa.binary(KEY_BYTES)

# A row as a reader gives it. `drop` is None for a row that goes on, else "<step>: <reason>": steps tag, one
# place counts, and the tag keeps a dropped row explainable.
ROW = pa.schema(
    [
        ("source", pa.string()),
        ("task", pa.string()),
        ("language", pa.string()),  # ISO 639-3 of the query; code is "code:<name>"; None when unknown
        ("query", pa.string()),
        ("passage", pa.string()),
        ("negatives", pa.list_(pa.string())),
        ("passage_language", pa.string()),  # None where it is the query's
        ("label", pa.string()),  # class of the query's text, where a clustering source says it
        ("drop", pa.string()),
        ("passage_score", pa.float32()),  # a teacher's, where the source brings scores: null where it does not
        ("negative_scores", pa.list_(pa.float32())),  # one for each of the negatives
    ]
)
SCORES = tuple(ROW)[-2:]
"""The columns that are written of sources with scores alone."""


@dataclass(frozen=True)
class SourceFacts:
    """What training, mining and pruning must know of a source, wherever its rows come from."""

    task: Task
    instruction: str
    """Said before its queries in stages with instructions."""
    weight: float = 1.0
    """How often a row is seen per epoch."""
    scored: bool = False
    """Whether its rows bring a teacher's scores."""


@dataclass(frozen=True)
class TextPrompts:
    """What all queries and all passages of prepared data start with."""

    query: str = ""
    document: str = ""


def text_key(text: str) -> bytes:
    """The 128-bit id of a text: blake2b of its UTF-8 bytes, the same on every machine and in every run."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=KEY_BYTES).digest()


def seeded_key(*parts: str | int | bytes) -> bytes:
    """A 128-bit hash of several parts, for orders and draws that depend on nothing but their arguments."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def rng(*parts: str | int) -> np.random.Generator:
    """A random generator seeded by all of its parts."""
    return np.random.default_rng(int.from_bytes(seeded_key(*parts), "little"))


def key_numbers(keys: pa.Array | pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Keys as an array [n, 2] of big-endian halves, so that sorting by (hi, lo) is sorting the bytes."""
    array = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    data = np.frombuffer(array.buffers()[1], dtype=">u8", count=2 * (array.offset + len(array)))
    return data.reshape(-1, 2)[array.offset :].astype(np.uint64)


def key_array(keys: np.ndarray[Any, np.dtype[np.uint64]]) -> pa.Array:
    """Halves of keys [n, 2] as an arrow array; the inverse of `key_numbers`."""
    return pa.Array.from_buffers(KEY, len(keys), [None, pa.py_buffer(np.ascontiguousarray(keys, ">u8").tobytes())])


def with_column(rows: pa.Table, name: str, values: Any) -> pa.Table:
    """The rows with other values in a column, which keeps its place and type."""
    index = rows.schema.get_field_index(name)
    field = rows.schema.field(index)
    return rows.set_column(index, field, pa.array(values, field.type) if isinstance(values, list) else values)


def query_text(text: str, instruction: str) -> str:
    """The query side's input: ``Instruct: {instruction}`` and the query on the next line (paper, use)."""
    return f"Instruct: {instruction}\nQuery: {text}" if instruction else text
