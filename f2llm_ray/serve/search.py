"""The corpus that the demo page searches: a folder that `f2llm embed` wrote, held in the replica's memory.

It shows what a model finds and is not for production: search is exact, over a bounded number of passages.
Shapes: n passages, d dims of the whole vector, k trained dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from f2llm_ray.base.errors import RunError
from f2llm_ray.model.checkpoint import ModelInfo, fingerprint
from f2llm_ray.model.dims import Vectors
from f2llm_ray.run.folder import Folder
from f2llm_ray.serve.api import Body, RequestBody

MANIFEST = "_manifest.json"
"""The file that `f2llm embed` writes last, beside the shards."""
MOST_ROWS = 100_000
"""Passages of a corpus: 400 MB of vectors at d = 1024, and tens of milliseconds per search on one core."""


class SearchRequest(RequestBody):
    """Body of POST /search."""

    model: str
    query: str
    top: int = Field(default=5, ge=1, le=100)
    """Passages per dim."""
    prompt_name: str | None = "query"
    """Prompt of the model before the query (see /info); null for none."""


class Hit(Body):
    """A passage that is among the nearest at one dim or more."""

    id: str
    text: str
    scores: dict[int, float]
    """Cosine with the query, by dim."""


class SearchAnswer(Body):
    """Answer of POST /search."""

    model: str
    rows: int
    """Passages searched."""
    nearest: dict[int, list[int]]
    """By dim: indices into `hits`, nearest first."""
    hits: list[Hit]


def check_corpus(corpus: Folder, model: Folder, info: ModelInfo) -> int:
    """Checks that a corpus can be searched with a model, and returns its number of passages.

    Raises:
        RunError: it is not finished, was embedded by another model, or lacks what the page needs.
    """
    if not corpus.exists(MANIFEST):
        raise RunError(f"{corpus.uri}: not a finished output of `f2llm embed`: it has no {MANIFEST}")
    made: dict[str, Any] = corpus.read_json(MANIFEST)
    if made.get("model_fingerprint") != fingerprint(model):
        raise RunError(f"{corpus.uri}: embedded by {made.get('model')!r} as it was then, not by {model.uri}")
    if made["column"] not in made["keep"]:
        raise RunError(f"{corpus.uri}: it has no texts: embed again with --keep-columns {made['column']}")
    if made["dimensions"] != info.dims[-1] or made["dtype"] not in {"float32", "float16"}:
        found = f"{made['dimensions']} dims as {made['dtype']}"
        raise RunError(f"{corpus.uri}: it has {found}: whole vectors as float32 or float16 are needed")
    if not 1 <= made["rows"] <= MOST_ROWS:
        raise RunError(f"{corpus.uri}: it has {made['rows']:,} rows: the demo page takes 1 to {MOST_ROWS:,}")
    return int(made["rows"])


@dataclass(frozen=True)
class SearchCorpus:
    """Passages and their vectors of length 1."""

    ids: list[str]
    texts: list[str]
    vectors_nd: Vectors

    @staticmethod
    def load(folder: Folder) -> SearchCorpus:
        """Reads a corpus that `check_corpus` has passed."""
        column = folder.read_json(MANIFEST)["column"]
        columns = ["id", column, "embedding"]
        table = pa.concat_tables(folder.read_table(shard, columns=columns) for shard in folder.files(".parquet"))
        vectors_nd = np.stack(table["embedding"].to_numpy()).astype(np.float32)
        return SearchCorpus(list(map(str, table["id"].to_pylist())), table[column].to_pylist(), vectors_nd)

    def search(self, query_d: Vectors, dims: tuple[int, ...], top: int) -> tuple[dict[int, list[int]], list[Hit]]:
        """The indices of the nearest passages at each dim among the hits, and the hits with scores at all dims.

        `dims` are the trained ones, smallest first, d last; `top` is the number of passages per dim.
        """
        scores_kn = cosines_by_dim(self.vectors_nd, query_d, dims)
        best_kt = np.argsort(-scores_kn, axis=1, kind="stable")[:, :top]
        rows = list(dict.fromkeys(best_kt[::-1].ravel().tolist()))  # those of the whole vector first
        place = {row: index for index, row in enumerate(rows)}
        hits = [
            Hit(
                id=self.ids[row],
                text=self.texts[row],
                scores={dim: round(float(scores_kn[k, row]), 4) for k, dim in enumerate(dims)},
            )
            for row in rows
        ]
        return {dim: [place[row] for row in best_kt[k].tolist()] for k, dim in enumerate(dims)}, hits


def cosines_by_dim(vectors_nd: Vectors, query_d: Vectors, dims: tuple[int, ...]) -> Vectors:
    """Cosines [k, n] of a query with passages at each dim; every part of the vectors is read once."""
    dot_n, squares_n, square = np.zeros(len(vectors_nd)), np.zeros(len(vectors_nd)), 0.0
    rows = []
    for start, stop in zip((0, *dims), dims, strict=False):
        part_nd, query_part = vectors_nd[:, start:stop], query_d[start:stop]
        dot_n += part_nd @ query_part
        squares_n += np.einsum("nd,nd->n", part_nd, part_nd)
        square += float(query_part @ query_part)
        rows.append(dot_n / np.sqrt(np.maximum(squares_n * square, np.finfo(np.float32).tiny)))
    return np.stack(rows).astype(np.float32)
