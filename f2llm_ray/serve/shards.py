"""The actor of bulk embedding: one engine that turns units of input into parquet shards of vectors.

Shapes: n texts of a batch, d dims of a stored vector (bytes, for packed signs).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq

from f2llm_ray.base.errors import DataError, RunError
from f2llm_ray.data.reading.base import BadRow
from f2llm_ray.data.tokens.store import Tokens, cut
from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.names import EngineName
from f2llm_ray.model.checkpoint import CALIBRATION_FILE
from f2llm_ray.model.dims import Vectors, quantize_vectors
from f2llm_ray.run.folder import Folder
from f2llm_ray.serve.inputs import Unit, UnitReader

Dtype = Literal["float32", "float16", "int8", "binary", "ubinary"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EmbedJob:
    """What is embedded, and how."""

    model: str
    input: str
    column: str
    output: str
    id_column: str | None = None
    keep: tuple[str, ...] = ()
    """Columns that are copied into the shards."""
    dimensions: int | None = None
    dtype: Dtype = "float32"
    prompt_name: str | None = None
    """The model's prompt for passages when unset."""
    engine: EngineName = "auto"
    """What computes the vectors (`serve.settings.Limits.engine`)."""
    shard_rows: int = 16_384
    """Rows of a shard: what is lost when a worker dies, and the share of work that a worker takes at a time."""
    batch_rows: int = 1024
    """Rows that are sorted by length, embedded and written at a time."""
    on_bad_row: BadRow = "error"
    """Whether a row without text stops its shard, or is left out and counted."""


@dataclass(frozen=True, kw_only=True)
class EmbedCount:
    """What was done, over one unit or all."""

    rows: int = 0
    embedded: int = 0
    """Texts that went through the model: equal ones of a shard go once."""
    tokens: int = 0
    cut: int = 0
    """Texts that were longer than the model's max_tokens."""
    skipped: int = 0
    """Rows that were left out, having no text or no id."""

    def __add__(self, other: EmbedCount) -> EmbedCount:
        return EmbedCount(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


@dataclass(frozen=True)
class TokenizedRows:
    """Rows in their order, and the tokens of the texts among them that did not come before."""

    start: int
    codes: np.ndarray[Any, np.dtype[np.int32]]
    """Which of the unit's distinct texts each row has [n]."""
    fresh: list[int]
    tokens: list[Tokens]


class ShardWriter:
    """The actor.

    Raises:
        RunError: not a model folder, or one without the ranges that int8 needs.
    """

    def __init__(self, job: EmbedJob) -> None:
        self.job = job
        self.reader = UnitReader(job.column, job.id_column, job.keep, job.on_bad_row)
        self.output = Folder.at(job.output)
        with Folder.at(job.model).as_local() as folder:
            self.engine = Engine(folder, engine=job.engine)
        info = self.engine.info
        self.dim = job.dimensions or info.dims[-1]
        self.prompt = info.prompts.get(job.prompt_name or "document", "")
        self.ranges = self.engine.ranges.get(self.dim)
        if job.dtype == "int8" and self.ranges is None:
            raise RunError(f"{job.model}: no int8 ranges for {self.dim} dims in {CALIBRATION_FILE}")
        self.kind = self._stored(np.zeros((1, self.dim), np.float32)).type
        self.ready = time.time()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Writes the shards of a Ray Data batch of units and gives what came of each."""
        return {"outcome": np.array([json.dumps(self._outcome(Unit(**json.loads(u)))) for u in batch["unit"]])}

    def _outcome(self, unit: Unit) -> dict[str, Any]:
        try:
            return {"count": asdict(self.write(unit)), "ready": self.ready}
        except DataError as error:
            # As a value: Ray Data passes on the text of an actor's exception but not the exception.
            return {"error": str(error)}

    def write(self, unit: Unit) -> EmbedCount:
        """Embeds one unit into its shard, which is there whole or not at all.

        Raises:
            DataError: a file that cannot be read, a missing column, or a row without text.
        """
        texts, columns, skipped = self.reader.read(unit)
        fields = [pa.field(name, values.type) for name, values in columns.items()]
        schema = pa.schema([*fields, pa.field("embedding", self.kind)])
        # Measured on 16,384 x 256: snappy saves nothing on floats and takes twice the time; bytes stand in parquet
        # as 4 bytes each unless a dictionary numbers them.
        counted = pa.types.is_integer(self.kind.value_type)
        vectors_path = "embedding.list.element"
        options: dict[str, Any] = {
            "compression": {vectors_path: "none"},
            "use_dictionary": [*columns, *([vectors_path] if counted else [])],
            "write_statistics": [*columns],
        }
        count = EmbedCount(rows=len(texts), skipped=skipped)
        # The counts travel in the shard, so that a manifest can be made of shards from many runs.
        with (
            self.output.replacing(unit.shard) as temporary,
            pq.ParquetWriter(temporary, schema, filesystem=self.output.filesystem, **options) as writer,
        ):
            for start, vectors_nd, spent in self._vectors(texts):
                rows = {name: values.slice(start, len(vectors_nd)) for name, values in columns.items()}
                writer.write_table(pa.table({**rows, "embedding": self._stored(vectors_nd)}, schema=schema))
                count += spent
            writer.add_key_value_metadata({"f2llm": json.dumps(asdict(count)), "engine": self.engine.engine})
        return count

    def _stored(self, vectors_nd: Vectors) -> pa.FixedSizeListArray:
        dtype = self.job.dtype
        if dtype == "float32":
            values = quantize_vectors(vectors_nd, "float")
        elif dtype == "float16":
            values = vectors_nd.astype(np.float16)
        else:
            values = quantize_vectors(vectors_nd, dtype, self.ranges)
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])

    def _vectors(self, texts: pa.LargeStringArray) -> Iterator[tuple[int, Vectors, EmbedCount]]:
        """The vectors of the rows, batch by batch, each distinct text embedded once."""
        coded = texts.dictionary_encode()
        codes, distinct = coded.indices.to_numpy(), coded.dictionary
        repeated = np.bincount(codes, minlength=len(distinct)) > 1
        longest = self.engine.info.max_tokens
        kept: dict[int, Vectors] = {}
        for batch in _ahead(self._batches(codes, distinct)):
            spent = EmbedCount(
                embedded=len(batch.fresh),
                tokens=sum(min(len(ids), longest) for ids in batch.tokens),
                cut=sum(len(ids) > longest for ids in batch.tokens),
            )
            vectors_nd = self.engine.embed_tokens([cut(ids, longest) for ids in batch.tokens], dim=self.dim)
            here = dict(zip(batch.fresh, vectors_nd, strict=True))
            kept.update((code, vector) for code, vector in here.items() if repeated[code])
            rows = [here[code] if code in here else kept[code] for code in batch.codes.tolist()]
            yield batch.start, np.stack(rows), spent

    def _batches(
        self, codes: np.ndarray[Any, np.dtype[np.int32]], distinct: pa.LargeStringArray
    ) -> Iterator[TokenizedRows]:
        seen = np.zeros(len(distinct), dtype=bool)
        for start in range(0, len(codes), self.job.batch_rows):
            here = codes[start : start + self.job.batch_rows]
            fresh = [int(code) for code in dict.fromkeys(here.tolist()) if not seen[code]]
            seen[fresh] = True
            texts = distinct.take(pa.array(fresh, pa.int32())).to_pylist()
            yield TokenizedRows(start, here, fresh, self.engine.tokenize(texts, prompt=self.prompt))


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, a thread making the next one while the last is in use: a GPU does not wait for the tokenizer."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer") as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item
