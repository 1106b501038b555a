"""Bulk embedding: files in, parquet shards of vectors out, on Ray Data actors that each hold an engine.

A unit is what is done or not done: one row group of a parquet file, or one jsonl or csv file. A unit becomes one
shard, written aside and moved into place, so a run that was cut off goes on where it stopped. A unit's texts are
in memory at once, its vectors only a batch at a time and where a text comes again.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq

from f2llm_ray import __version__
from f2llm_ray.data.tokens import cut
from f2llm_ray.errors import DataError, RunError
from f2llm_ray.model.checkpoint import INFO_FILE, ModelInfo, load_info
from f2llm_ray.model.dims import Vectors
from f2llm_ray.run import Folder
from f2llm_ray.serve.engine import Engine
from f2llm_ray.serve.inputs import Unit, find_files, plan, read_unit
from f2llm_ray.session import connect

SETTINGS = "settings.json"
MANIFEST = "manifest.json"
SAMPLE = 1 << 20
"""Bytes at each end of a weight file that tell two models apart; training moves every weight."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is embedded, and how."""

    model: str
    input: str
    column: str
    output: str
    id_column: str | None = None
    dimensions: int | None = None
    prompt_name: str | None = None
    batch_rows: int = 1024


@dataclass(frozen=True, kw_only=True)
class Count:
    """What was done, over one unit or all."""

    rows: int = 0
    embedded: int = 0
    """Texts that went through the model: equal ones of a shard go once."""
    tokens: int = 0
    cut: int = 0
    """Texts that were longer than the model's max_tokens."""

    def __add__(self, other: Count) -> Count:
        return Count(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


def run(job: Job, *, workers: int | None = None) -> dict[str, Any]:
    """Embeds all that is not yet embedded and returns the manifest, with this call's rates.

    Args:
        job: what to embed.
        workers: number of actors; one per GPU, or per CPU core where there is no GPU, when unset.

    Raises:
        RunError: no such model or input, a wrong setting, or an output made with other settings.
        DataError: a file without the column, or a row without text.
    """
    started = time.time()
    model, source, output = Folder.at(job.model), Folder.at(job.input), Folder.at(job.output)
    if f"{output.path}/".startswith(f"{source.path}/"):
        raise RunError(f"{output.uri}: lies within the input; its shards would become input themselves")
    info = read_info(model)
    check_settings(job, info)
    files = find_files(source)
    claim(output, settings_of(job, model, info, source, files))
    units = list(plan(source, files))
    done = set(output.files(".parquet"))
    waiting = [unit for unit in units if unit.shard not in done]
    # Absolute from here on: an actor may run in another folder than the one who asked.
    absolute = Job(**{**asdict(job), "model": model.uri, "input": source.uri, "output": output.uri})
    count = sum(_embed_units(absolute, waiting, workers), Count())
    seconds = time.time() - started
    totals = _totals(output, units)
    manifest = {"shards": len(units), **asdict(totals), **output.read_json(SETTINGS), "code_version": __version__}
    output.write_json(MANIFEST, manifest)
    return {
        **manifest,
        "output_uri": output.uri,
        "embedded_now": asdict(count),
        "shards_skipped": len(units) - len(waiting),
        "seconds": round(seconds, 2),
        "rows_per_second": round(count.rows / seconds, 1),
        "tokens_per_second": round(count.tokens / seconds, 1),
    }


def read_info(model: Folder) -> ModelInfo:
    """The facts of a model folder anywhere, without its weights.

    Raises:
        RunError: not a model folder.
    """
    if not model.exists(INFO_FILE):
        raise RunError(f"{model.uri}: not a model folder: it has no {INFO_FILE}")
    with tempfile.TemporaryDirectory() as copy:
        (Path(copy) / INFO_FILE).write_bytes(model.read_bytes(INFO_FILE))
        return load_info(Path(copy))


def check_settings(job: Job, info: ModelInfo) -> None:
    """Refuses what the model was not made for, before any work.

    Raises:
        RunError: dims it was not trained for, or a prompt it does not have.
    """
    if job.batch_rows < 1:
        raise RunError(f"batch rows: {job.batch_rows}, at least 1 is needed")
    if job.dimensions is not None and job.dimensions not in info.dims:
        allowed = ", ".join(map(str, info.dims))
        raise RunError(f"dimensions: {info.name} was not trained for {job.dimensions}; allowed: {allowed}")
    if job.prompt_name is not None and job.prompt_name not in info.prompts:
        raise RunError(f"prompt: {info.name} has no {job.prompt_name!r}; it has: {', '.join(info.prompts)}")


def settings_of(job: Job, model: Folder, info: ModelInfo, source: Folder, files: dict[str, int]) -> dict[str, Any]:
    """All that decides what the shards hold."""
    return {
        "model": info.name,
        "model_fingerprint": fingerprint(model),
        "input": source.uri,
        "files": files,
        "column": job.column,
        "id_column": job.id_column,
        "dimensions": job.dimensions or info.dims[-1],
        "prompt_name": job.prompt_name,
    }


def fingerprint(model: Folder) -> str:
    """Tells a model from any other by its facts, tokenizer and both ends of each weight file, wherever it lies."""
    digest = hashlib.blake2b(digest_size=8)
    for name in (*model.files(".json"), *model.files(".safetensors")):
        with model.filesystem.open_input_file(f"{model.path}/{name}") as file:
            size = file.size()
            digest.update(f"{name} {size} ".encode())
            digest.update(file.read(size if name.endswith(".json") else SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read())
    return digest.hexdigest()


def claim(output: Folder, settings: dict[str, Any]) -> None:
    """Marks the output as made with these settings.

    Raises:
        RunError: it was made with others; the message names those that differ.
    """
    if output.exists(SETTINGS):
        before = output.read_json(SETTINGS)
        other = [f"{key} (was {_short(before.get(key))}, now {_short(value)})" for key, value in settings.items()
                 if before.get(key) != value]  # fmt: skip
        if other:
            raise RunError(f"{output.uri}: holds shards made with another {', '.join(other)}; give another output")
    elif output.files(".parquet"):
        raise RunError(f"{output.uri}: holds parquet files of something else; give another output")
    else:
        output.write_json(SETTINGS, settings)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


class ShardWriter:
    """The actor: one engine that turns units into shards."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.source, self.output = Folder.at(job.input), Folder.at(job.output)
        with Folder.at(job.model).as_local() as folder:
            self.engine = Engine(folder)
        info = self.engine.info
        self.dim = job.dimensions or info.dims[-1]
        self.prompt = "" if job.prompt_name is None else info.prompts[job.prompt_name]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Writes the shards of a Ray Data batch of units and gives what came of each."""
        return {"outcome": np.array([json.dumps(self._outcome(Unit(**json.loads(u)))) for u in batch["unit"]])}

    def _outcome(self, unit: Unit) -> dict[str, Any]:
        try:
            return asdict(self.write(unit))
        except DataError as error:
            # As a value: Ray Data passes on the text of an actor's exception but not the exception.
            return {"error": str(error)}

    def write(self, unit: Unit) -> Count:
        """Embeds one unit into its shard.

        Raises:
            DataError: a file that cannot be read, a missing column, or a row without text.
        """
        texts, ids = read_unit(self.source, unit, self.job.column, self.job.id_column)
        columns = {"id": ids}
        if self.job.id_column is None:
            file = unit.file or Path(self.source.path).name
            columns = {"file": pa.array([file] * len(texts), pa.string()), **columns}
        kind = pa.list_(pa.float32(), self.dim)
        schema = pa.schema([*((name, values.type) for name, values in columns.items()), ("embedding", kind)])
        count = Count(rows=len(texts))
        # The counts travel in the shard, so that a manifest can be made of shards from many runs.
        with (
            self.output.replacing(unit.shard) as temporary,
            pq.ParquetWriter(temporary, schema, filesystem=self.output.filesystem) as writer,
        ):
            for start, vectors, spent in self._vectors(texts):
                rows = {name: values.slice(start, len(vectors)) for name, values in columns.items()}
                embedding = pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), type=kind)
                writer.write_table(pa.table({**rows, "embedding": embedding}, schema=schema))
                count += spent
            writer.add_key_value_metadata({"f2llm": json.dumps(asdict(count))})
        return count

    def _vectors(self, texts: pa.StringArray) -> Iterator[tuple[int, Vectors, Count]]:
        """The vectors of the rows, batch by batch, each distinct text embedded once."""
        coded = texts.dictionary_encode()
        codes, distinct = coded.indices.to_numpy(), coded.dictionary
        repeated = np.bincount(codes, minlength=len(distinct)) > 1
        kept: dict[int, Vectors] = {}
        for start in range(0, len(codes), self.job.batch_rows):
            batch = codes[start : start + self.job.batch_rows]
            fresh = [int(code) for code in dict.fromkeys(batch) if code not in kept]
            tokens = self.engine.tokenize(
                distinct.take(pa.array(fresh, pa.int32())).to_pylist(), prompt=self.prompt
            )
            longest = self.engine.info.max_tokens
            spent = Count(
                embedded=len(fresh),
                tokens=sum(min(len(ids), longest) for ids in tokens),
                cut=sum(len(ids) > longest for ids in tokens),
            )
            vectors = self.engine.embed_tokens([cut(ids, longest) for ids in tokens], dim=self.dim)
            here = dict(zip(fresh, vectors, strict=True))
            kept.update((code, vector) for code, vector in here.items() if repeated[code])
            rows = [here[code] if code in here else kept[code] for code in batch.tolist()]
            yield start, np.stack(rows), spent


def _embed_units(job: Job, units: list[Unit], workers: int | None) -> Iterator[Count]:
    """Hands the units to actors and gives the counts as they come; what is wrong with some is said after the rest.

    Raises:
        DataError: some units could not be embedded.
    """
    if not units:
        return
    import ray
    import ray.data

    connect()
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    size = min(workers or gpus or int(resources["CPU"]), len(units))
    items = [{"unit": json.dumps(asdict(unit))} for unit in units]
    # A block per unit up to 1,000 blocks: whoever is done early takes the next.
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), 1000)).map_batches(
        ShardWriter,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=size),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )
    errors = []
    for row in dataset.iter_rows():
        outcome = json.loads(row["outcome"])
        if "error" in outcome:
            errors.append(outcome["error"])
        else:
            yield Count(**outcome)
    if errors:
        raise DataError("\n".join(sorted(errors)))


def _totals(output: Folder, units: list[Unit]) -> Count:
    """Counts over all the shards, also those of earlier runs."""
    total = Count()
    for unit in units:
        metadata = pq.read_metadata(f"{output.path}/{unit.shard}", filesystem=output.filesystem).metadata
        total += Count(**json.loads(metadata[b"f2llm"]))
    return total
