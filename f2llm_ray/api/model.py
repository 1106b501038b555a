"""A model folder as an object that turns texts into vectors.

Shapes: n and m texts, d dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from f2llm_ray.base.errors import ArgumentError
from f2llm_ray.model.checkpoint import load_info
from f2llm_ray.model.described import SETTINGS_FILE
from f2llm_ray.model.dims import Quantized, Vectors, quantize_vectors, unit
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    from f2llm_ray.engine.engine import Engine

Dtype = Literal["float32", "float16", "int8", "binary", "ubinary"]


def load(model: str | Path) -> Model:
    """Loads a model: a folder of ours or of sentence-transformers, by its path or URI (s3://, gs://, ...).

    It runs on the GPU where there is one.

    Raises:
        RunError: no such folder, or the engine cannot run what is in it.
        DataError: torch or transformers is not installed.
    """
    return Model(Folder.at(str(model)))


class Model:
    """A model that is loaded; `load` makes it."""

    def __init__(self, folder: Folder) -> None:
        self.uri = folder.uri
        """Its folder."""
        info = load_info(folder)
        said = folder.read_json(SETTINGS_FILE) if folder.exists(SETTINGS_FILE) else {}
        self.name: str = info.name
        self.dims: tuple[int, ...] = info.dims
        """The dims that it was trained for, smallest first; the last one is the whole vector."""
        self.max_tokens: int = info.max_tokens
        """Longer texts are cut."""
        self.prompts: dict[str, str] = {"query": "", "document": "", **(said.get("prompts") or info.prompts)}
        """What may be put before texts, by the names that `encode` takes."""
        self.default_prompt_name: str | None = said.get("default_prompt_name")
        """The prompt before texts where none is asked for; models of ours have none."""
        self._engine: Engine = _engine(folder)

    def encode(
        self,
        texts: str | Sequence[str],
        prompt_name: str | None = None,
        *,
        prompt: str | None = None,
        dim: int | None = None,
        dtype: Dtype = "float32",
    ) -> Quantized:
        """The vectors of texts, as `SentenceTransformer.encode` of the folder gives them: each has length 1.

        Args:
            texts: one text or several.
            prompt_name: the name of a prompt of `prompts` that is put before each text.
            prompt: another prompt in its place; "" for none.
            dim: one of `dims`, scaled to length 1 again; the whole vector when unset.
            dtype: float32, float16, int8 by the ranges in the model's folder, or binary or ubinary, packed signs.

        Returns:
            [d] for one text, [n, d] for several; ceil(d / 8) bytes for packed signs.

        Raises:
            ArgumentError: no such prompt, dim or dtype, int8 without ranges, or something that is no text.
        """
        if not isinstance(texts, Iterable):
            raise ArgumentError(f"texts: found {type(texts).__name__}, expected a text or a list of texts")
        single = isinstance(texts, str)
        found = [texts] if isinstance(texts, str) else list(texts)
        for place, text in enumerate(found):
            if not isinstance(text, str):
                raise ArgumentError(f"texts[{place}]: found {type(text).__name__}, expected text")
        if dim is not None and dim not in self.dims:
            raise ArgumentError(f"dim: found {dim}, expected one of {', '.join(map(str, self.dims))}")
        vectors_nd = self._engine.embed(found, prompt=self._prompt(prompt, prompt_name), dim=dim)
        vectors = self._typed(vectors_nd, dtype)
        return vectors[0] if single else vectors

    def similarity(self, a: Vectors, b: Vectors) -> Vectors:
        """The cosines [n, m] of float vectors [n, d] and [m, d]; a single vector [d] counts as [1, d].

        Raises:
            ArgumentError: vectors of other types or of different dims.
        """
        left, right = (np.atleast_2d(np.asarray(vectors)) for vectors in (a, b))
        for vectors in (left, right):
            if not np.issubdtype(vectors.dtype, np.floating):
                raise ArgumentError(f"similarity: found {vectors.dtype} vectors, expected float32 or float16")
        if left.shape[1] != right.shape[1]:
            raise ArgumentError(f"similarity: found vectors of {left.shape[1]} and {right.shape[1]} dims")
        left, right = (unit(vectors.astype(np.float32)) for vectors in (left, right))
        return left @ right.T

    def __repr__(self) -> str:
        return f"Model({self.name!r}, dims={list(self.dims)}, max_tokens={self.max_tokens})"

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None:
            return prompt
        name = name or self.default_prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            raise ArgumentError(f"prompt_name: found {name!r}, expected one of {', '.join(self.prompts)}")
        return self.prompts[name]

    def _typed(self, vectors_nd: Vectors, dtype: Dtype) -> Quantized:
        if dtype in ("float32", "float16"):
            return vectors_nd.astype(dtype)
        if dtype not in ("int8", "binary", "ubinary"):
            raise ArgumentError(f"dtype: found {dtype!r}, expected float32, float16, int8, binary or ubinary")
        ranges = self._engine.ranges.get(vectors_nd.shape[1])
        if dtype == "int8" and ranges is None:
            raise ArgumentError(f"dtype: {self.uri} has no int8 ranges, which the pipeline measures of its models")
        return quantize_vectors(vectors_nd, dtype, ranges)


def _engine(folder: Folder) -> Engine:
    from f2llm_ray.base.optional import require

    for module in ("torch", "transformers"):
        require(module, extra="eval")
    from f2llm_ray.engine.engine import Engine

    with folder.as_local() as path:
        return Engine(path)
