"""Vectors of texts: float16 files in key order, each encoded once and written whole.

float16 halves the disk and moves a cosine of unit vectors by about 1e-5, less than bf16 weights do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.keys import Keys
from f2llm_ray.data.ragged import Ints
from f2llm_ray.data.tokens.store import TokenStore, cut
from f2llm_ray.model.dims import Vectors as Floats
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    from f2llm_ray.data.tokens.store import Tokens
    from f2llm_ray.engine.names import EngineName

Halves = np.ndarray[Any, np.dtype[np.float16]]


def shard_name(shard: int) -> str:
    """File of a shard of vectors."""
    return f"{shard:06d}.npy"


def halves(vectors_nd: Floats, keys_n2: Keys, model: str) -> Halves:
    """Vectors in float16, with the keys of their texts.

    Raises:
        RunError: `model` gave one that is not finite in float16.
    """
    with np.errstate(over="ignore"):  # what becomes infinite is found below
        found_nd = vectors_nd.astype(np.float16)
    broken = np.flatnonzero(~np.isfinite(found_nd).all(axis=1))
    if len(broken):
        high, low = (int(half) for half in keys_n2[broken[0]])
        raise RunError(
            f"{model} gives vectors that are not finite for {len(broken)} of {len(found_nd)} texts in float16, "
            f"first the one with key {high:016x}{low:016x}"
        )
    return found_nd


class VectorWriter:
    """Looks up the tokens of texts by key, encodes them with one engine, and writes files of vectors.

    Args:
        model: a model folder.
        tokens: a token store made with the model's tokenizer.
        threads: threads on CPU.
        engine: what computes the vectors (`settings.Compute.engine`).
        unit: unit vectors; else as they are before normalisation.
        dim: their first dims; all when unset.
    """

    def __init__(
        self,
        model: Folder,
        tokens: Folder,
        threads: int,
        *,
        engine: EngineName = "torch",
        unit: bool = True,
        dim: int | None = None,
    ) -> None:
        import torch

        from f2llm_ray.engine.engine import Engine

        torch.set_num_threads(threads)
        self.unit, self.dim = unit, dim
        with model.as_local() as folder:
            self.engine = Engine(folder, engine=engine, make=False)
        self._open = ExitStack()  # a copy of a store that is not local lives as long as this object
        self.store = TokenStore(self._open.enter_context(tokens.as_local()))

    def write(self, keys_n2: Keys, folder: Folder, name: str) -> dict[str, Any]:
        """Encodes the texts of these keys into one .npy file [n, dim], which is there whole or not at all.

        Returns:
            The number of texts and tokens, and the seconds it took.

        Raises:
            RunError: a key that has no tokens, or a text whose vector is not finite in float16.
        """
        started = time.perf_counter()
        vectors_nd, count = self.encode(keys_n2, f"{folder.uri}/{name}")
        folder.write_array(name, vectors_nd)
        return {"texts": len(keys_n2), "tokens": count, "seconds": time.perf_counter() - started}

    def encode(self, keys_n2: Keys, place: str) -> tuple[Halves, int]:
        """The vectors [n, dim] of the texts of these keys, and how many tokens they have.

        Raises:
            RunError: as `write`; the message names the place.
        """
        tokens = [cut(ids, self.engine.info.max_tokens) for ids in self.store.lookup(keys_n2)]
        vectors_nd = halves(self._vectors(tokens), keys_n2, f"{place}: {self.engine.info.name}")
        return vectors_nd, sum(map(len, tokens))

    def _vectors(self, tokens: list[Tokens]) -> Floats:
        import torch

        if self.unit:
            return self.engine.embed_tokens(tokens, dim=self.dim)
        with torch.inference_mode():
            vectors: Floats = self.engine.encode(tokens)[:, : self.dim].cpu().numpy()
        return vectors


def gather(folder: Folder, texts: Ints, per_shard: int) -> Floats:
    """Vectors [n, d] in float32 of the texts with these numbers, which must be ascending."""
    parts = []
    for shard in range(int(texts[0]) // per_shard, int(texts[-1]) // per_shard + 1):
        first, last = np.searchsorted(texts, [shard * per_shard, (shard + 1) * per_shard])
        if first < last:
            vectors = folder.read_array(shard_name(shard))
            parts.append(vectors[texts[first:last] - shard * per_shard].astype(np.float32))
    return np.concatenate(parts)


def shards_of(folder: Folder, texts: int, per_shard: int) -> Iterator[tuple[int, Halves]]:
    """Every shard with the number of its first text; a shard is closed before the next is opened."""
    for first in range(0, texts, per_shard):
        yield first, folder.read_array(shard_name(first // per_shard))
