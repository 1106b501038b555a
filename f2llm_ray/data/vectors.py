"""The vectors of a source's texts: float16 shards in key order, each encoded once and written whole.

float16 halves the disk and moves a cosine of unit vectors by about 1e-5, less than bf16 weights do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np

from f2llm_ray.data.candidates import read_array, write_array
from f2llm_ray.data.keys import Keys
from f2llm_ray.data.ragged import Ints
from f2llm_ray.data.tokens import TokenStore, cut
from f2llm_ray.data.topk import Floats
from f2llm_ray.errors import RunError
from f2llm_ray.run import Folder

Halves = np.ndarray[Any, np.dtype[np.float16]]


def shard_name(shard: int) -> str:
    """File of a shard of vectors."""
    return f"{shard:06d}.npy"


class Encoder:
    """The actor's work: one engine that turns shards of keys into shards of vectors.

    Args:
        model: a model folder.
        tokens: the token store of the prepared data, made with the model's tokenizer.
        threads: torch threads on CPU.
    """

    def __init__(self, model: Folder, tokens: Folder, threads: int) -> None:
        import torch

        from f2llm_ray.serve.engine import Engine

        torch.set_num_threads(threads)
        with model.as_local() as folder:
            self.engine = Engine(folder)
        self._open = ExitStack()  # a copy of a store that is not local lives as long as this object
        self.store = TokenStore(self._open.enter_context(tokens.as_local()))

    def write(self, keys_n2: Keys, folder: Folder, shard: int) -> dict[str, Any]:
        """Encodes the texts of these keys into one shard.

        Returns:
            The number of texts and tokens, and the seconds it took.

        Raises:
            RunError: a key that has no tokens, or a text whose vector is not finite.
        """
        started = time.perf_counter()
        tokens = [cut(ids, self.engine.info.max_tokens) for ids in self.store.lookup(keys_n2)]
        vectors_nd = self.engine.embed_tokens(tokens)
        broken = np.flatnonzero(~np.isfinite(vectors_nd).all(axis=1))
        if len(broken):
            high, low = (int(half) for half in keys_n2[broken[0]])
            raise RunError(
                f"{folder.uri}/{shard_name(shard)}: {self.engine.info.name} gives vectors that are not finite for "
                f"{len(broken)} of {len(tokens)} texts, first the one with key {high:016x}{low:016x}"
            )
        write_array(folder, shard_name(shard), vectors_nd.astype(np.float16))
        count = sum(map(len, tokens))
        return {"texts": len(tokens), "tokens": count, "seconds": time.perf_counter() - started}


def gather(folder: Folder, texts: Ints, per_shard: int) -> Floats:
    """Vectors [n, d] in float32 of text numbers, which rise."""
    parts = []
    for shard in range(int(texts[0]) // per_shard, int(texts[-1]) // per_shard + 1):
        first, last = np.searchsorted(texts, [shard * per_shard, (shard + 1) * per_shard])
        if first < last:
            vectors = read_array(folder, shard_name(shard))
            parts.append(vectors[texts[first:last] - shard * per_shard].astype(np.float32))
    return np.concatenate(parts)


def shards_of(folder: Folder, texts: int, per_shard: int) -> Iterator[tuple[int, Halves]]:
    """Every shard with the number of its first text; a shard is let go before the next is opened."""
    for first in range(0, texts, per_shard):
        yield first, read_array(folder, shard_name(first // per_shard))
