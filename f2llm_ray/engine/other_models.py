"""Models from elsewhere as texts in, unit vectors out: of sentence-transformers, or behind an OpenAI endpoint.

Shapes: n texts, d dim.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.optional import require
from f2llm_ray.model.checkpoint import INFO_FILE, ModelInfo
from f2llm_ray.model.described import MODULES_FILE, sides
from f2llm_ray.model.dims import Vectors, unit
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    from f2llm_ray.engine.engine import Engine
    from f2llm_ray.engine.names import EngineName

TEXTS_PER_REQUEST = 64
REQUESTS = 4
"""Requests at once; one that a busy endpoint refuses is sent again."""
RETRIES = 5
NO_MODEL = f"no model; expected {INFO_FILE} (ours) or {MODULES_FILE} (sentence-transformers)"
HUB_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
OTHER_FORMATS = ("onnx/*", "openvino/*")
"""Folders of a model on the hub that hold its weights once more."""


def open_folder(
    folder: Path, engine: EngineName = "torch", layers: int | None = None
) -> Engine | SentenceTransformers:
    """A model folder of ours, all of it or its first `layers`, or of sentence-transformers.

    Ours is run by an engine that has its files already.

    Raises:
        RunError: it is neither, or cannot be loaded.
    """
    from f2llm_ray.engine.engine import Engine

    if (folder / INFO_FILE).is_file():
        return Engine(folder, engine=engine, make=False, layers=layers)
    if (folder / MODULES_FILE).is_file():
        return SentenceTransformers(folder)
    raise RunError(f"{folder}: {NO_MODEL}")


@contextmanager
def on_disk(model: Folder | str) -> Iterator[Path]:
    """A model folder as a local one; that of a name on the hub is its cache's, downloaded where it is not there.

    Raises:
        DataError: huggingface_hub is not installed.
        RunError: the hub has no such model, or cannot be reached.
    """
    if isinstance(model, Folder):
        with model.as_local() as path:
            yield path
        return
    hub = require("huggingface_hub", extra="datasets")
    try:
        folder = hub.snapshot_download(model, allow_patterns=HUB_FILES, ignore_patterns=OTHER_FORMATS)
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        raise RunError(f"{model}: not a folder, and not found on the hub: {str(error).splitlines()[0]}") from None
    yield Path(folder)


class _OtherModel:
    """What models from elsewhere have in common: one dim, and no ranges for int8."""

    device = "cpu"

    def __init__(self, name: str, dim: int, max_tokens: int, prompts: dict[str, str]) -> None:
        self.info = ModelInfo(name=name, dims=(dim,), max_tokens=max_tokens, prompts=prompts, instructions=False)
        self.ranges: Mapping[int, Vectors] = {}


class SentenceTransformers(_OtherModel):
    """A folder as sentence-transformers embeds it, with its own prompts for queries and documents.

    Raises:
        DataError: sentence-transformers is not installed.
        RunError: it cannot load the folder from safetensors without running code of the folder.
    """

    def __init__(self, folder: Path) -> None:
        package = require("sentence_transformers", extra="compare")
        try:
            self.model = package.SentenceTransformer(
                str(folder),
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise RunError(f"{folder}: sentence-transformers cannot load it: {error}") from None
        dim = self.model.get_sentence_embedding_dimension()
        query, document = sides(self.model.prompts)
        prompts = {"query": query, "document": document}
        super().__init__(folder.name, int(dim or 0), int(self.model.max_seq_length or 0), prompts)
        self.device = self.model.device.type

    def embed_counted(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors [n, d] and the tokens of the texts; prompts are in the texts already."""
        vectors_nd = self.model.encode(
            list(texts), prompt="", normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        longest = self.info.max_tokens or None
        ids = self.model.tokenizer(list(texts), truncation=longest is not None, max_length=longest)["input_ids"]
        return np.asarray(vectors_nd, dtype=np.float32), sum(map(len, ids))


def endpoint_client(model: str) -> tuple[Any, str, str]:
    """The client of an OpenAI-compatible endpoint that is given as URL#NAME; its URL, and the name of the model.

    The key is that of the environment variable `OPENAI_API_KEY`, if set, and is sent to the endpoint only. What
    is refused since the endpoint is busy or broken (408, 409, 429, 5xx) is sent again, after waits that double or
    that the endpoint asks for.

    Raises:
        DataError: the client is not installed.
        RunError: no URL or name is given.
    """
    openai = require("openai", extra="compare")
    url, _, name = model.partition("#")
    if not url or not name:
        raise RunError(f"{model}: expected URL#NAME, such as http://127.0.0.1:8000/v1#f2llm-v2-80m")
    key = os.environ.get("OPENAI_API_KEY") or "none"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=RETRIES), url, name


class RemoteModel(_OtherModel):
    """An OpenAI-compatible endpoint, given as URL#NAME (`endpoint_client`); texts are sent as they are.

    Raises:
        DataError: the client is not installed.
        RunError: no name is given, or the endpoint does not answer.
    """

    def __init__(self, model: str) -> None:
        self.client, self.url, self.name = endpoint_client(model)
        # Evaluation cuts texts that are too long, and so do servers such as ours and TEI when they are asked to.
        self.extra: dict[str, bool] = {"truncate": True}
        try:
            probe_nd, _ = self._ask(["dim"])
        except RunError:
            self.extra = {}
            probe_nd, _ = self._ask(["dim"])
        super().__init__(self.name, probe_nd.shape[1], 0, {})

    def embed_counted(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors [n, d] of texts, and the tokens that the endpoint counts."""
        parts = [texts[start : start + TEXTS_PER_REQUEST] for start in range(0, len(texts), TEXTS_PER_REQUEST)]
        with ThreadPoolExecutor(REQUESTS) as pool:
            answers = list(pool.map(self._ask, parts))
        vectors_nd = np.concatenate([vectors for vectors, _ in answers])
        return unit(vectors_nd), sum(count for _, count in answers)

    def _ask(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        from openai import OpenAIError

        try:
            answer: Any = self.client.embeddings.create(model=self.name, input=list(texts), extra_body=self.extra)
        except OpenAIError as error:
            raise RunError(f"{self.url}: {self.name} does not embed: {error}") from None
        if len(answer.data) != len(texts):
            raise RunError(f"{self.url}: found {len(answer.data)} vectors, expected {len(texts)}")
        rows = sorted(answer.data, key=lambda row: row.index)
        return np.array([row.embedding for row in rows], dtype=np.float32), int(answer.usage.prompt_tokens)
