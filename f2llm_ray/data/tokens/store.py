"""The token store: each distinct text tokenised once, in files that a worker maps from disk.

`<piece>.bin` holds uint32 token ids end to end. `index-<shard>.keys.npy` [2, n] holds the sorted keys of one key
range, `index-<shard>.places.npy` [n] where each one's tokens lie. A look-up is one binary search in a mapped array
and one read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.keys import Keys, find_keys, shard_of
from f2llm_ray.data.schema import key_numbers

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Tokens = np.ndarray[Any, np.dtype[np.uint32]]
"""The token ids of one text [t], EOS last."""

META = "store.json"
PLACE = np.dtype([("piece", "<u4"), ("length", "<u4"), ("offset", "<u8")])
"""Where a text's tokens lie: which .bin, how many, and how many tokens come before them."""


def cut(tokens: Tokens, max_tokens: int) -> Tokens:
    """The first max_tokens tokens, with EOS still last."""
    return tokens if len(tokens) <= max_tokens else np.append(tokens[: max_tokens - 1], tokens[-1])


def tokenize(tokenizer: Tokenizer, texts: list[str], max_tokens: int | None = None) -> list[Tokens]:
    """Token ids of each text, EOS last, cut to max_tokens where given."""
    tokens = [np.array(encoding.ids, dtype=np.uint32) for encoding in tokenizer.encode_batch_fast(texts)]
    return tokens if max_tokens is None else [cut(ids, max_tokens) for ids in tokens]


def write_piece(path: Path, batches: Iterable[list[Tokens]]) -> pa.Table:
    """Writes the tokens of one piece, batch by batch, and returns (offset, length) of each text in order.

    The lengths lie beside the tokens, written last: a piece that has them is finished and is not written again.
    """
    finished = path.with_suffix(".lengths.npy")
    if not finished.exists():
        lengths: list[int] = []
        with path.open("wb") as file:
            for batch in batches:
                lengths += [len(tokens) for tokens in batch]
                if batch:
                    file.write(np.concatenate(batch).astype("<u4").tobytes())
        temporary = path.with_suffix(".lengths.tmp.npy")
        np.save(temporary, np.array(lengths, dtype=np.uint32))
        temporary.replace(finished)
    length = np.load(finished)
    offset = np.cumsum(length, dtype=np.uint64) - length
    return pa.table({"offset": pa.array(offset, pa.uint64()), "length": pa.array(length, pa.uint32())})


def write_index(folder: Path, shard: int, entries: pa.Table) -> None:
    """Writes the index of one key range from (key, piece, offset, length), in any order."""
    entries = entries.sort_by("key")
    places = np.empty(len(entries), dtype=PLACE)
    for name in ("piece", "length", "offset"):
        places[name] = entries[name].to_numpy()
    np.save(folder / f"index-{shard:04d}.keys.npy", np.ascontiguousarray(key_numbers(entries["key"]).T))
    np.save(folder / f"index-{shard:04d}.places.npy", places)


def write_meta(folder: Path, *, shards: int, texts: int, tokens: int) -> None:
    """Writes what a reader must know, last of all files."""
    (folder / META).write_text(json.dumps({"shards": shards, "texts": texts, "tokens": tokens}) + "\n")


class TokenStore:
    """A token store on a local disk, mapped as it is needed; nothing of it is held in memory.

    Raises:
        RunError: the folder is no finished token store.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / META).is_file():
            raise RunError(f"{folder}: not a finished token store: it has no {META}")
        meta = json.loads((folder / META).read_text())
        self.folder = folder
        self.shards: int = meta["shards"]
        self.texts: int = meta["texts"]
        self.tokens: int = meta["tokens"]
        self._index: dict[int, tuple[Keys, np.ndarray[Any, Any]]] = {}
        self._pieces: dict[int, Tokens] = {}

    def lookup(self, keys: Keys) -> list[Tokens]:
        """Tokens of each key [n, 2], in the given order.

        Raises:
            RunError: a key that is not in the store.
        """
        shards = shard_of(keys, self.shards)
        found: list[Tokens] = [np.empty(0, np.uint32)] * len(keys)
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            for row, place in zip(rows, self._places(int(shard), keys[rows]), strict=True):
                offset, length = int(place["offset"]), int(place["length"])
                found[row] = self._piece(int(place["piece"]))[offset : offset + length]
        return found

    def lengths(self, keys: Keys) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Number of tokens of each key [n, 2].

        Raises:
            RunError: a key that is not in the store.
        """
        shards = shard_of(keys, self.shards)
        found = np.zeros(len(keys), np.int64)
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            found[rows] = self._places(int(shard), keys[rows])["length"]
        return found

    def _places(self, shard: int, keys: Keys) -> np.ndarray[Any, Any]:
        if shard not in self._index:
            stem = f"index-{shard:04d}"
            self._index[shard] = (
                np.load(self.folder / f"{stem}.keys.npy", mmap_mode="r"),
                np.load(self.folder / f"{stem}.places.npy", mmap_mode="r"),
            )
        ordered, places = self._index[shard]
        rows = find_keys(ordered, keys)
        if (rows < 0).any():
            key = keys[np.flatnonzero(rows < 0)[0]]
            raise RunError(f"{self.folder}: no text with key {int(key[0]):016x}{int(key[1]):016x}")
        return places[rows]

    def _piece(self, piece: int) -> Tokens:
        if piece not in self._pieces:
            path = self.folder / f"{piece:06d}.bin"
            empty = path.stat().st_size == 0
            self._pieces[piece] = np.empty(0, "<u4") if empty else np.memmap(path, dtype="<u4", mode="r")
        return self._pieces[piece]
