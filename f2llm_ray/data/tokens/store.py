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

from f2llm_ray.data.keyed import META, KeyedStore, Values, read_meta, write_shard
from f2llm_ray.data.keys import Keys
from f2llm_ray.data.ragged import Ints
from f2llm_ray.data.schema import key_numbers

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Tokens = np.ndarray[Any, np.dtype[np.uint32]]
"""The token ids of one text [t], EOS last."""

NAMES = ("index-{:04d}.keys.npy", "index-{:04d}.places.npy")
PLACE = np.dtype([("piece", "<u4"), ("length", "<u4"), ("offset", "<u8")])
"""Where a text's tokens lie: which .bin, how many, and how many tokens come before them."""


def cut(tokens: Tokens, max_tokens: int) -> Tokens:
    """The first max_tokens tokens, with EOS still last."""
    return tokens if len(tokens) <= max_tokens else np.append(tokens[: max_tokens - 1], tokens[-1])


HEAD_CHARS = 16
"""Characters per wanted token of the part that is tokenized of a very long text; 4 are usual, 1 in Chinese."""
MARGIN = 64
"""Tokens that a part must have beyond the wanted ones: its last ones depend on where it was cut off."""


def tokenize(tokenizer: Tokenizer, texts: list[str], max_tokens: int | None = None) -> list[Tokens]:
    """Token ids of each text, EOS last, cut to max_tokens where given.

    A text far longer than that is not tokenized to its end, so that its cost is that of what is kept.
    """
    if max_tokens is None:
        return [_ids(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts)]
    longest = HEAD_CHARS * (max_tokens + MARGIN)
    whole = tokenizer.encode_batch_fast([text for text in texts if len(text) <= longest])
    short = iter(whole)
    tokens = [
        _ids(next(short).ids) if len(text) <= longest else _head(tokenizer, text, max_tokens) for text in texts
    ]
    return [cut(ids, max_tokens) for ids in tokens]


def _head(tokenizer: Tokenizer, text: str, max_tokens: int) -> Tokens:
    """Token ids of the least part of a long text that surely holds `max_tokens` of its tokens, or of all of it."""
    size = HEAD_CHARS * (max_tokens + MARGIN)
    while True:
        ids = _ids(tokenizer.encode(text[:size]).ids)
        if size >= len(text) or len(ids) >= max_tokens + MARGIN:
            return ids
        size *= 4


def _ids(ids: list[int]) -> Tokens:
    return np.array(ids, dtype=np.uint32)


def code_points(texts: list[str]) -> list[Tokens]:
    """Texts as their Unicode code points: a store of these holds the texts themselves."""
    return [np.frombuffer(text.encode("utf-32-le"), dtype="<u4") for text in texts]


def text_of(points: Tokens) -> str:
    """The text of its code points."""
    return points.astype("<u4").tobytes().decode("utf-32-le")


def write_piece(path: Path, batches: Iterable[list[Tokens]], max_tokens: int | None = None) -> pa.Table:
    """Writes the tokens of one piece, batch by batch, each text cut to `max_tokens` where given.

    The lengths lie beside the tokens, written last: a piece that has them is finished and is not written again.

    Returns:
        (offset, length, whole) of each text in order; `whole` is its length before it was cut.
    """
    finished = path.with_suffix(".lengths.npy")
    if not finished.exists():
        lengths: list[tuple[int, int]] = []
        with path.open("wb") as file:
            for batch in batches:
                stored = batch if max_tokens is None else [cut(tokens, max_tokens) for tokens in batch]
                lengths += [(len(kept), len(tokens)) for kept, tokens in zip(stored, batch, strict=True)]
                if batch:
                    file.write(np.concatenate(stored).astype("<u4").tobytes())
        temporary = path.with_suffix(".lengths.tmp.npy")
        np.save(temporary, np.array(lengths, dtype=np.uint32).reshape(-1, 2).T)
        temporary.replace(finished)
    length, whole = np.load(finished)
    offset = np.cumsum(length, dtype=np.uint64) - length
    columns = {"length": pa.array(length, pa.uint32()), "whole": pa.array(whole, pa.uint32())}
    return pa.table({"offset": pa.array(offset, pa.uint64()), **columns})


def write_index(folder: Path, shard: int, entries: pa.Table) -> None:
    """Writes the index of one key range from (key, piece, offset, length), in any order."""
    places = np.empty(len(entries), dtype=PLACE)
    for name in ("piece", "length", "offset"):
        places[name] = entries[name].to_numpy()
    write_shard(folder, shard, NAMES, key_numbers(entries["key"]), places)


def write_meta(folder: Path, *, shards: int, texts: int, tokens: int) -> None:
    """Writes what a reader must know, last of all files."""
    (folder / META).write_text(json.dumps({"shards": shards, "texts": texts, "tokens": tokens}) + "\n")


class TokenStore:
    """A token store on a local disk, mapped as it is needed; nothing of it is held in memory.

    Raises:
        RunError: the folder is no finished token store.
    """

    def __init__(self, folder: Path) -> None:
        facts = read_meta(folder, "token store")
        self.folder = folder
        self.texts, self.tokens = facts["texts"], facts["tokens"]
        self._index = KeyedStore(folder, facts["shards"], NAMES)
        self._pieces: dict[int, Tokens] = {}

    def lookup(self, keys: Keys) -> list[Tokens]:
        """Tokens of each key [n, 2], in the given order.

        Raises:
            RunError: a key that is not in the store.
        """
        places = self._places(keys).tolist()
        return [self._piece(piece)[offset : offset + length] for piece, length, offset in places]

    def lengths(self, keys: Keys) -> Ints:
        """Number of tokens of each key [n, 2].

        Raises:
            RunError: a key that is not in the store.
        """
        return self._places(keys)["length"].astype(np.int64)

    def _places(self, keys: Keys) -> Values:
        places = np.empty(len(keys), PLACE)
        self._index.fill(places, keys, required="text")
        return places

    def _piece(self, piece: int) -> Tokens:
        if piece not in self._pieces:
            path = self.folder / f"{piece:06d}.bin"
            empty = path.stat().st_size == 0
            self._pieces[piece] = np.empty(0, "<u4") if empty else np.memmap(path, dtype="<u4", mode="r")
        return self._pieces[piece]
