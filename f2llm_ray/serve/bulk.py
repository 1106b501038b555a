"""Bulk embedding: files in, parquet shards of vectors out, on Ray Data actors that each hold an engine.

A unit of at most `shard_rows` rows is what is done or not done. It becomes one shard, written aside and moved into
place, so a run that was cut off goes on where it stopped, and files that were added or changed cost only their own
shards.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pyarrow import parquet as pq

from f2llm_ray import __version__
from f2llm_ray.base.errors import DataError, RunError
from f2llm_ray.base.progress import Progress
from f2llm_ray.base.session import connect
from f2llm_ray.data.reading.paths import find_files
from f2llm_ray.data.reading.tables import SUFFIXES, TableFile, require_columns
from f2llm_ray.model.checkpoint import CALIBRATION_FILE, ModelInfo, fingerprint, load_info
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.inputs import InputFile, InputIndex
from f2llm_ray.serve.inputs import Unit, units_of
from f2llm_ray.serve.search import MANIFEST
from f2llm_ray.serve.shards import DTYPES, EmbedCount, EmbedJob, ShardWriter

SETTINGS = "_settings.json"
"""Like the manifest with an underscore, so that whoever reads the folder as a parquet data set passes over it."""


@dataclass(frozen=True)
class Survey:
    """What there is to embed, and what was embedded before."""

    job: EmbedJob
    """With absolute paths: an actor may run in another folder than the one who asked."""
    settings: dict[str, Any]
    """As `settings_of`."""
    units: list[Unit]
    waiting: list[Unit]
    """Those without a shard."""
    stale: list[str]
    """Shards of files that have changed or are gone."""


def survey(job: EmbedJob) -> Survey:
    """Checks a job and finds its units; nothing is written.

    Raises:
        RunError: no such model, a wrong setting, or an output made with other settings.
        DataError: no input, a file that cannot be read, or a column that the first file on this machine lacks.
    """
    model, source, output = Folder.at(job.model), Folder.at(job.input), Folder.at(job.output)
    if output.filesystem.get_file_info(output.path).is_file:
        raise RunError(f"{output.uri}: a file, expected a folder for the shards")
    if f"{output.path}/".startswith(f"{source.path}/"):
        raise RunError(f"{output.uri}: lies within the input; its shards would become input themselves")
    info = load_info(model)
    check_settings(job, info, model)
    files = find_files(source.uri, SUFFIXES, source.uri)
    _check_columns(job, TableFile.at(Folder.at(next(iter(files.values())).uri)))
    settings = settings_of(job, model, info, source)
    before = check_output(output, settings)
    known = known_files(files, before)
    units = units_of(files, {name: entry["number"] for name, entry in known.items()}, job.shard_rows)
    there, wanted = set(output.files(".parquet")), {unit.shard for unit in units}
    # A file that changed has a new number, so that its old shards are those of no unit.
    stale = sorted(there - wanted)
    absolute = replace(job, model=model.uri, input=source.uri, output=output.uri)
    waiting = [unit for unit in units if unit.shard not in there]
    return Survey(absolute, {**settings, "files": known}, units, waiting, stale)


def _check_columns(job: EmbedJob, file: TableFile) -> None:
    if file.file.local is None or not file.file.filesystem.get_file_info(file.file.path).size:
        return
    require_columns(filter(None, (job.column, job.id_column, *job.keep)), file.names(), file.place)


def run(job: EmbedJob, *, workers: int | None = None) -> dict[str, Any]:
    """Embeds all that is not yet embedded and returns the manifest, with this call's rates.

    The rates are of the time after the first actor was ready: `startup_seconds` is what came before.

    Args:
        job: what to embed.
        workers: number of actors; one per GPU, or per CPU core where there is no GPU, when unset.

    Raises:
        RunError: no such model, a wrong setting, or an output made with other settings.
        DataError: no input, a file without the column, or a row without text.
    """
    if workers is not None and workers < 1:
        raise RunError(f"workers: {workers}, at least 1 is needed")
    started = time.time()
    found, output = survey(job), Folder.at(job.output)
    units, waiting = found.units, found.waiting
    for shard in found.stale:
        output.filesystem.delete_file(f"{output.path}/{shard}")
    output.write_json(SETTINGS, found.settings)
    count, ready = _embed_units(found.job, waiting, len(units), workers)
    seconds, working = time.time() - started, time.time() - ready
    total, engines = _totals(output, units)
    facts = {"shards": len(units), "engines": engines, **asdict(total)}
    manifest = {**facts, **output.read_json(SETTINGS), "code_version": __version__}
    output.write_json(MANIFEST, manifest)
    for name in output.files():
        if name.startswith(".shard-"):  # half a shard, of a worker that was killed
            output.filesystem.delete_file(f"{output.path}/{name}")
    return {
        **manifest,
        "output_uri": output.uri,
        "embedded_now": asdict(count),
        "shards_skipped": len(units) - len(waiting),
        "shards_removed": len(found.stale),
        "seconds": round(seconds, 2),
        "startup_seconds": round(seconds - working, 2),
        "rows_per_second": round(count.rows / working, 1) if waiting else 0.0,
        "tokens_per_second": round(count.tokens / working, 1) if waiting else 0.0,
    }


def check_settings(job: EmbedJob, info: ModelInfo, model: Folder) -> None:
    """Refuses what the model was not made for, before any work.

    Raises:
        RunError: dims it was not trained for, a prompt or int8 ranges it does not have, or columns that clash.
    """
    for name in ("batch_rows", "shard_rows"):
        if getattr(job, name) < 1:
            raise RunError(f"{name.replace('_', ' ')}: {getattr(job, name)}, at least 1 is needed")
    if job.dimensions is not None and job.dimensions not in info.dims:
        allowed = ", ".join(map(str, info.dims))
        raise RunError(f"dimensions: {info.name} was not trained for {job.dimensions}; allowed: {allowed}")
    if job.prompt_name is not None and job.prompt_name not in info.prompts:
        raise RunError(f"prompt: {info.name} has no {job.prompt_name!r}; it has: {', '.join(info.prompts)}")
    if job.dtype not in DTYPES:
        raise RunError(f"dtype: {job.dtype!r} is not one of {', '.join(DTYPES)}")
    if job.dtype == "int8" and not model.exists(CALIBRATION_FILE):
        raise RunError(f"dtype: int8 needs {model.uri}/{CALIBRATION_FILE}, and the model has none")
    taken = {"id", "embedding", *(["file"] if job.id_column is None else [])}
    for name in job.keep:
        if name in taken or job.keep.count(name) > 1:
            raise RunError(f"keep columns: {name!r} is a column of the shards already")


def settings_of(job: EmbedJob, model: Folder, info: ModelInfo, source: Folder) -> dict[str, Any]:
    """All that decides what the shards hold, but for the files themselves."""
    return {
        "model": info.name,
        "model_fingerprint": fingerprint(model),
        "input": source.uri,
        "column": job.column,
        "id_column": job.id_column,
        "keep": list(job.keep),
        "dimensions": job.dimensions or info.dims[-1],
        "dtype": job.dtype,
        "prompt_name": job.prompt_name or "document",
        "shard_rows": job.shard_rows,
    }


def known_files(files: Mapping[str, InputFile], before: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What tells each file from what was there before under its name, and its number.

    A file keeps its number as long as its content stays; one that is new or has changed gets the next.

    Args:
        files: the input by name.
        before: what this gave for the run before; empty without one.
    """
    index, found = InputIndex(), dict[str, dict[str, Any]]()
    free = 1 + max((entry["number"] for entry in before.values()), default=-1)
    for name, file in files.items():
        (known,) = index.known([file])
        old = before.get(name)
        if old is None or old["digest"] != known.digest:
            old, free = {"number": free, "digest": known.digest}, free + 1
        found[name] = old
    return found


def check_output(output: Folder, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Refuses an output that was made with other settings, which the message names, or of something else.

    Returns:
        The files that it was made of (`known_files`).

    Raises:
        RunError: it was.
    """
    if output.exists(SETTINGS):
        before: dict[str, Any] = output.read_json(SETTINGS)
        if not isinstance(before, dict) or not isinstance(before.get("files"), dict):
            raise RunError(f"{output.uri}/{SETTINGS}: not the settings of an output; give another output")
        changed = {key: value for key, value in settings.items() if before.get(key) != value}
        other = [f"{key} (was {_short(before.get(key))}, now {_short(value)})" for key, value in changed.items()]
        if other:
            raise RunError(f"{output.uri}: holds shards made with another {', '.join(other)}; give another output")
        files: dict[str, Any] = before["files"]
        if not all(isinstance(entry, dict) for entry in files.values()):
            raise RunError(f"{output.uri}: made by an earlier version of this package; give another output")
        return files
    if output.files(".parquet"):
        raise RunError(f"{output.uri}: holds parquet files of something else; give another output")
    return {}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _embed_units(job: EmbedJob, units: list[Unit], total: int, workers: int | None) -> tuple[EmbedCount, float]:
    """Hands the units to actors; what is wrong with some is said after the rest.

    Returns:
        What was done, and when the first actor was ready.

    Raises:
        DataError: some units could not be embedded.
    """
    count, ready, errors = EmbedCount(), time.time(), []
    progress = Progress("embed", total, "shards")
    for number, outcome in enumerate(_outcomes(job, units, workers), start=total - len(units) + 1):
        if "error" in outcome:
            errors.append(outcome["error"])
            continue
        ready = min(outcome["ready"], ready) if count.rows else outcome["ready"]
        count += EmbedCount(**outcome["count"])
        seconds = max(time.time() - ready, 1e-9)
        rates = (f"{n / seconds:,.0f} {name}/s" for n, name in ((count.rows, "rows"), (count.tokens, "tokens")))
        progress.update(number, f"{count.rows:,} rows", *rates)
    if errors:
        raise DataError("\n".join(sorted(errors)))
    return count, ready


def _outcomes(job: EmbedJob, units: list[Unit], workers: int | None) -> Iterator[dict[str, Any]]:
    """What came of each unit, as the actors finish them."""
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
    for row in dataset.iter_rows():
        yield json.loads(row["outcome"])


def _totals(output: Folder, units: list[Unit]) -> tuple[EmbedCount, dict[str, int]]:
    """Counts over all the shards, also those of earlier runs, and how many of them each engine made."""
    total, engines = EmbedCount(), Counter[str]()
    for unit in units:
        metadata = pq.read_metadata(f"{output.path}/{unit.shard}", filesystem=output.filesystem).metadata
        total += EmbedCount(**json.loads(metadata[b"f2llm"]))
        engines[metadata.get(b"engine", b"torch").decode()] += 1  # earlier versions had torch alone
    return total, dict(sorted(engines.items()))
