"""What may teach: a model folder that the engine runs, or anything that gives vectors for texts.

A model folder, of ours or of sentence-transformers, reads tokens. The texts themselves go to a folder that only
the sentence-transformers package can run, to an OpenAI-compatible endpoint, and to a table of texts and vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.flow import Item
from f2llm_ray.data.keyed import META
from f2llm_ray.data.keys import Keys
from f2llm_ray.data.schema import TextPrompts
from f2llm_ray.data.tokens.store import TokenStore, text_of
from f2llm_ray.data.tokens.tokenizer import load_tokenizer
from f2llm_ray.engine.names import EngineName
from f2llm_ray.engine.other_models import RemoteModel, SentenceTransformers
from f2llm_ray.engine.vector_files import Halves, VectorWriter, halves
from f2llm_ray.model.checkpoint import INFO_FILE, load_info, prompts_of
from f2llm_ray.model.described import MODULES_FILE
from f2llm_ray.model.dims import Vectors
from f2llm_ray.run.folder import Folder
from f2llm_ray.train import teacher_store
from f2llm_ray.train.settings import Distill, is_endpoint
from f2llm_ray.train.vector_table import VectorTable, write_vector_table

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHUNK = 1024
"""Texts that a teacher of texts is asked for at once: what a run that was cut off asks again."""


class TakesTexts(Protocol):
    """A teacher that reads texts."""

    def embed_counted(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors [n, d] of texts, and how many tokens it read."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher, looked at but not loaded."""

    dims: tuple[int, ...]
    """The dims that it was trained for, smallest first; only the last where nothing says more."""
    prompts: TextPrompts
    """What its texts start with."""
    instructed: bool
    """Whether it reads a query with the instruction of its source, as the student does."""
    tokenizer: Tokenizer | None = None
    """Of a teacher that reads tokens."""
    texts: Callable[[], TakesTexts] | None = None
    """Opens a teacher that reads texts."""
    local: bool = True
    """Whether it runs here, on a worker's GPU where there is one."""


def look_at(teacher: Folder | str, settings: Distill, data: TextPrompts, table: Folder) -> Teacher:
    """What a teacher is.

    Args:
        teacher: a model folder, URL#NAME of an endpoint, or the path of a table of texts and vectors.
        settings: the student's.
        data: what the texts of the prepared data start with.
        table: gets the vectors of a table, by text.

    Raises:
        DataError: a package is not installed, or the table is not one.
        RunError: not a model, or an endpoint that does not answer.
    """
    if isinstance(teacher, str):
        asked = Teacher(dims=(), prompts=settings.taught_prompts(TextPrompts()), instructed=False, local=False)
        if is_endpoint(teacher):
            return replace(asked, dims=RemoteModel(teacher).info.dims, texts=partial(RemoteModel, teacher))
        return replace(asked, dims=(write_vector_table(teacher, table),), texts=partial(VectorTable, table))
    try:
        info = load_info(teacher)
    except RunError:
        if not teacher.exists(MODULES_FILE):
            raise
        model = _package(teacher)
        prompts = settings.taught_prompts(TextPrompts(model.info.prompts["query"], model.info.prompts["document"]))
        return Teacher(dims=model.info.dims, prompts=prompts, instructed=False, texts=partial(_package, teacher))
    prompts = settings.taught_prompts(prompts_of(info, data))
    with teacher.as_local() as folder:
        tokenizer = load_tokenizer(folder)
    ours = teacher.exists(INFO_FILE) and settings.teacher_prompts.query is None
    return Teacher(dims=info.dims, prompts=prompts, instructed=ours, tokenizer=tokenizer)


def _package(folder: Folder) -> SentenceTransformers:
    with folder.as_local() as local:
        return SentenceTransformers(local)


class Earlier:
    """The vectors that the same teacher has given an earlier stage, from which they are copied."""

    def __init__(self, vectors: Folder | None, dims: int) -> None:
        self._open = ExitStack()  # a copy of a store that is not local lives as long as this object
        self.store: teacher_store.TeacherStore | None = None
        if vectors is not None and vectors.exists(META):
            store = teacher_store.TeacherStore(self._open.enter_context(vectors.as_local()))
            self.store = store if store.dims == dims else None

    def missing(self, keys_n2: Keys) -> Keys:
        """Those of the keys that have no vector there."""
        return keys_n2 if self.store is None else keys_n2[~self.store.known(keys_n2)[1]]

    def completed(self, keys_n2: Keys, encode: Callable[[Keys], tuple[Halves, int]]) -> tuple[Halves, Item]:
        """The vectors [n, D] of keys, and how many `texts` and `tokens` were encoded: what is not there."""
        if self.store is None:
            vectors_nd, tokens = encode(keys_n2)
            return vectors_nd, {"texts": len(keys_n2), "tokens": tokens}
        vectors_nd, there_n = self.store.known(keys_n2)
        count = 0
        if not there_n.all():
            vectors_nd[~there_n], count = encode(keys_n2[~there_n])
        return vectors_nd, {"texts": int((~there_n).sum()), "tokens": count}


class PieceEncoder:
    """Encodes pieces of the store by a teacher that reads tokens, one after the other, inside an actor."""

    def __init__(
        self,
        teacher: Folder,
        tokens: Folder,
        vectors: Folder,
        threads: int,
        dims: int,
        engine: EngineName,
        earlier: Folder | None = None,
    ) -> None:
        self.encoder = VectorWriter(teacher, tokens, threads, engine=engine, unit=False, dim=dims)
        self.vectors, self.earlier = vectors, Earlier(earlier, dims)

    def __call__(self, item: Item) -> Item:
        """Writes the vectors of one piece."""
        keys = teacher_store.read_keys(self.vectors, item["shard"], item["piece"])
        name = teacher_store.piece_file(item["shard"], item["piece"])
        place = f"{self.vectors.uri}/{name}"
        found, counts = self.earlier.completed(keys, lambda some: self.encoder.encode(some, place))
        self.vectors.write_array(name, found)
        return {**item, **counts}


class ChunkEncoder:
    """Asks a teacher that reads texts for the vectors of some of them, inside an actor."""

    def __init__(
        self,
        open_teacher: Callable[[], TakesTexts],
        texts: Folder,
        vectors: Folder,
        threads: int,
        dims: int,
        earlier: Folder | None = None,
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        self.teacher, self.vectors, self.dims = open_teacher(), vectors, dims
        self._open = ExitStack()  # a copy of a store that is not local lives as long as this object
        self.store = TokenStore(self._open.enter_context(texts.as_local()))
        self.earlier = Earlier(earlier, dims)

    def __call__(self, item: Item) -> Item:
        """Writes the vectors of one chunk of a piece."""
        found, counts = self.earlier.completed(chunk_keys(self.vectors, item), self._ask)
        self.vectors.write_array(chunk_file(item), found)
        return {**item, **counts}

    def _ask(self, keys_n2: Keys) -> tuple[Halves, int]:
        vectors_nd, tokens = self.teacher.embed_counted([text_of(points) for points in self.store.lookup(keys_n2)])
        if vectors_nd.shape[1] < self.dims:
            raise RunError(f"the teacher gives vectors of {vectors_nd.shape[1]} dims, before of {self.dims}")
        return halves(vectors_nd[:, : self.dims], keys_n2, "the teacher"), tokens


def missing_chunks(pieces: list[Item], vectors: Folder) -> list[Item]:
    """The chunks of pieces that no earlier try has written."""
    there = set(vectors.files())
    chunks = [chunk for piece in pieces for chunk in chunks_of_piece(piece)]
    return [chunk for chunk in chunks if chunk_file(chunk) not in there]


def chunks_of_piece(item: Item) -> list[Item]:
    """The chunks that a piece is asked in."""
    size = item["chunk"]
    return [
        {**item, "first": first, "texts": min(size, item["texts"] - first)}
        for first in range(0, item["texts"], size)
    ]


def chunk_file(chunk: Item) -> str:
    """File with the vectors of a chunk, until its piece is written."""
    return "chunk-{shard:04d}-{piece:05d}-{first:05d}-{texts}.npy".format(**chunk)


def chunk_keys(vectors: Folder, chunk: Item) -> Keys:
    """The keys of a chunk's texts."""
    keys = teacher_store.read_keys(vectors, chunk["shard"], chunk["piece"])
    return keys[chunk["first"] : chunk["first"] + chunk["texts"]]


def join_chunks(item: Item, *, vectors: Folder) -> Item:
    """Writes a piece of its chunks, and removes them."""
    names = [chunk_file(chunk) for chunk in chunks_of_piece(item)]
    piece = np.concatenate([vectors.read_array(name) for name in names])
    vectors.write_array(teacher_store.piece_file(item["shard"], item["piece"]), piece)
    for name in names:
        vectors.filesystem.delete_file(f"{vectors.path}/{name}")
    return item
