"""The models that score pairs of a query and a passage again, and how each of them does.

A cross-encoder reads every pair, an embedding model each text once, as a query or as a passage. Both read the
texts themselves, with prompts of their own.

Shapes: q queries, p passages, m pairs, d dims.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from f2llm_ray.data.flow import Item
from f2llm_ray.data.keys import Keys
from f2llm_ray.data.ragged import Ints
from f2llm_ray.data.schema import query_text
from f2llm_ray.data.tokens.store import TokenStore, text_of
from f2llm_ray.engine.cross_encoder import CROSS_ENCODER, CrossEncoder, Kind, kind_of, load_pair_tokenizer
from f2llm_ray.engine.other_models import on_disk, open_folder
from f2llm_ray.engine.vector_files import gather, halves, shard_name
from f2llm_ray.mine.candidates import Candidates
from f2llm_ray.mine.search import ROWS, Layout
from f2llm_ray.model.dims import Vectors
from f2llm_ray.run.folder import Folder

SIDES = ("query", "passage")


@dataclass(frozen=True)
class Rescorer:
    """A model that scores pairs again, looked at but not loaded."""

    model: Folder | str
    """Its folder, or its name on the hub."""
    kind: Kind

    @property
    def name(self) -> str:
        """What errors call it."""
        return self.model if isinstance(self.model, str) else self.model.uri


def look_at(model: Folder | str) -> Rescorer:
    """What a model is.

    Raises:
        DataError: it is to come from the hub, and a package is not installed.
        RunError: not a model, not on the hub, or a cross-encoder with several labels or without its tokenizer.
    """
    with on_disk(model) as path:
        kind = kind_of(Folder.at(str(path)))
        if kind == CROSS_ENCODER:
            load_pair_tokenizer(path)
    return Rescorer(model, kind)


# The texts.


class Texts:
    """The texts of a source by their numbers, out of a store of whole texts."""

    def __init__(self, store: Folder) -> None:
        self._open = ExitStack()  # a copy of a store that is not local lives as long as this object
        self.store = TokenStore(self._open.enter_context(store.as_local()))

    def of(self, keys: Keys) -> list[str]:
        """The texts of keys [n, 2]."""
        return [text_of(points) for points in self.store.lookup(keys)]


def keys_of(found: Candidates, texts: Ints) -> Keys:
    """The keys [n, 2] of texts by their numbers."""
    return np.ascontiguousarray(found.texts[:, texts].T)


def texts_of_side(found: Candidates, side: str) -> Ints:
    """The numbers, rising, of all queries of a source, or of all its passages."""
    return found.queries if side == "query" else np.flatnonzero(np.asarray(found.number) >= 0)


# The scores.


class Scorer(Protocol):
    """A rescorer made ready."""

    def __call__(self, source: str, found: Candidates, query_m: Ints, text_m: Ints) -> Vectors:
        """Scores [m] of pairs of a source: places among its queries, and numbers of its texts."""


class PairScorer:
    """Scores by a cross-encoder; made once per actor."""

    def __init__(self, model: Folder | str, store: Folder) -> None:
        with on_disk(model) as folder:
            self.model = CrossEncoder(folder)
        self.texts = Texts(store)

    def __call__(self, source: str, found: Candidates, query_m: Ints, text_m: Ints) -> Vectors:
        """Scores [m] of pairs; each distinct text is looked up once."""
        del source
        sides = []
        for numbers in (np.asarray(found.queries)[query_m], text_m):
            distinct, place = np.unique(numbers, return_inverse=True)
            texts = self.texts.of(keys_of(found, distinct))
            sides.append([texts[at] for at in place.tolist()])
        return self.model.score(*sides)


class SideEncoder:
    """Writes the vectors of texts of one side, as an embedding model reads them; made once per actor."""

    def __init__(
        self, model: Folder | str, store: Folder, out: Folder, layout: Layout, instructions: Mapping[str, str]
    ) -> None:
        with on_disk(model) as folder:
            self.model = open_folder(folder)
        self.texts, self.out, self.layout, self.instructions = Texts(store), out, layout, dict(instructions)

    def __call__(self, item: Item) -> Item:
        """Writes the vectors of one shard of a side of a source."""
        started = time.perf_counter()
        name, side, shard, size = item["source"], item["side"], item["shard"], self.layout.texts
        found = Candidates.load(self.out / "plan" / name)
        keys = keys_of(found, texts_of_side(found, side)[shard * size : (shard + 1) * size])
        texts = [self._prompted(text, side, name) for text in self.texts.of(keys)]
        vectors, _ = self.model.embed_counted(texts)
        found_nd = halves(vectors, keys, self.model.info.name)
        vectors_of_side(self.out, name, side).write_array(shard_name(shard), found_nd)
        return {**item, "seconds": time.perf_counter() - started}

    def _prompted(self, text: str, side: str, source: str) -> str:
        info = self.model.info
        if side == "query" and info.instructions:
            return query_text(text, self.instructions[source])
        return info.prompts.get("query" if side == "query" else "document", "") + text


def vectors_of_side(out: Folder, source: str, side: str) -> Folder:
    """Where `SideEncoder` leaves the vectors."""
    return out / "rescorer" / source / side


class VectorScorer:
    """Scores by the vectors that `SideEncoder` wrote: their cosines."""

    def __init__(self, out: Folder, layout: Layout) -> None:
        self.out, self.layout = out, layout

    def __call__(self, source: str, found: Candidates, query_m: Ints, text_m: Ints) -> Vectors:
        """Scores [m] of pairs."""
        passage_m = np.searchsorted(texts_of_side(found, "passage"), text_m)
        sides = []
        for side, place_m in zip(SIDES, (query_m, passage_m), strict=True):
            distinct, of_pair_m = np.unique(place_m, return_inverse=True)
            sides.append((gather(vectors_of_side(self.out, source, side), distinct, self.layout.texts), of_pair_m))
        (query_qd, query_of), (passage_pd, passage_of) = sides
        score_m = np.empty(len(query_m), np.float32)
        for at in range(0, len(query_m), ROWS):
            some = slice(at, at + ROWS)
            score_m[some] = np.einsum("md,md->m", query_qd[query_of[some]], passage_pd[passage_of[some]])
        return score_m
