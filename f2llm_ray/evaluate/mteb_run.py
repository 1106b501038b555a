"""mteb's own tasks on a Ray cluster: an actor per GPU or core encodes, results are in mteb's own files.

The output folder is a cache of mteb's (`mteb.ResultCache`): `results/<model>/<revision>/<task>.json`. A task whose
file is there is not run again, so a second run goes on where the first ended.

All actors encode the texts of all tasks, in pieces of `PIECE` texts: the last, largest task has all GPUs, and the
vectors do not depend on their number. The pieces of a task that is not finished are kept in `vectors/`, so that it
goes on within it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.optional import require
from f2llm_ray.base.progress import Progress
from f2llm_ray.base.session import connect
from f2llm_ray.model.checkpoint import load_info
from f2llm_ray.model.dims import Vectors
from f2llm_ray.run.folder import Folder

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

    from f2llm_ray.engine.names import EngineName

PIECE = 1024
"""Texts that are encoded together; their vectors do not depend on who does it."""
PROMPTS_FILE, OWN = "prompts.json", "own"
"""In the output folder: which instructions its results are with."""


def find_tasks(benchmarks: Sequence[str], names: Sequence[str], languages: Sequence[str]) -> list[AbsTask]:
    """The tasks of mteb: those of the benchmarks, or the named ones, or the named ones among the benchmarks'.

    Args:
        benchmarks: mteb's names of benchmarks, such as "MTEB(Multilingual, v2)".
        names: mteb's names of tasks.
        languages: ISO 639-3; only these subsets are run, and tasks without any are left out. All where empty.

    Raises:
        DataError: mteb is not installed.
        RunError: mteb does not know a name, or nothing is left.
    """
    mteb = require("mteb", extra="mteb")
    try:
        found = _of_benchmarks(benchmarks) if benchmarks else mteb.get_tasks(tasks=list(dict.fromkeys(names)))
    except (KeyError, ValueError) as error:
        raise RunError(f"mteb: {error.args[0] if error.args else error}") from None
    known = {task.metadata.name for task in found}
    missing = sorted(set(names) - known)
    if missing and benchmarks:
        raise RunError(f"--tasks: {missing} are not in {list(benchmarks)}")
    wanted = [task for task in found if not names or not benchmarks or task.metadata.name in names]
    tasks = [task for task in wanted if not languages or _cut(task, languages)]
    if not tasks:
        raise RunError(
            f"mteb: none of {[task.metadata.name for task in wanted]} has one of the languages {list(languages)}"
        )
    return tasks


def _of_benchmarks(names: Sequence[str]) -> list[AbsTask]:
    """The tasks of benchmarks, with the subsets and splits that these take of them."""
    import mteb

    found: dict[str, AbsTask] = {}
    for name in names:
        for task in mteb.get_benchmark(name).tasks:
            # A copy: mteb returns the same task objects to every caller.
            other = found.setdefault(task.metadata.name, copy(task))
            subsets, splits = {*other.hf_subsets, *task.hf_subsets}, {*other.eval_splits, *task.eval_splits}
            other.hf_subsets = [subset for subset in task.metadata.hf_subsets if subset in subsets]
            other.filter_eval_splits(sorted(splits))
    return list(found.values())


def _cut(task: AbsTask, languages: Sequence[str]) -> bool:
    """Keeps only the subsets of a task that have one of the languages; returns whether there are any."""
    try:
        task.filter_languages(languages, hf_subsets=task.hf_subsets)
    except ValueError:
        return False
    return True


def run_mteb(
    model: str,
    tasks: Sequence[AbsTask],
    output: str,
    *,
    workers: int | None = None,
    prompts: str | None = None,
    engine: EngineName = "torch",
) -> dict[str, float]:
    """Runs the tasks that have no result yet.

    Args:
        model: a model folder that every node can read.
        tasks: what to run.
        output: folder for the results, one that every node writes to.
        workers: actors that encode; by default one per GPU, else one per CPU core.
        prompts: name of a table of instructions by task (`mteb_model.PROMPTS`); the tasks' own where unset.
        engine: what computes the vectors (`engine.settings.Compute.engine`).

    Returns:
        mteb's main score of each task, also of those that were there already.

    Raises:
        RunError: the folder is not a model folder, or it or the output is not on a disk, or the output has results
            with other instructions; or, after all other tasks are done, the tasks that failed, each with its
            error.
    """
    import ray
    from ray.util import ActorPool

    # Workers run in other working directories, and mteb reads and writes files.
    model, output = (_on_disk(place) for place in (model, output))
    load_info(Path(model))
    table: Mapping[str, str] | None = None
    if prompts is not None:
        from f2llm_ray.evaluate.mteb_model import prompts_of

        table = prompts_of(prompts)
    _keep_prompts(Path(output), prompts)
    connect()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    size = max(1, workers or gpus or int(ray.cluster_resources()["CPU"]))
    encoder = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(_Encoder)
    encoders = [encoder.remote(model, engine) for _ in range(size)]
    # Tasks book no core: nearly all of their time they wait for vectors.
    remote = ray.remote(num_cpus=0)(_Worker)
    runners = min(size, len(tasks))
    pool = ActorPool([remote.remote(model, output, encoders, table) for _ in range(runners)])
    progress, scores, failed = Progress("mteb", len(tasks), "tasks"), {}, []
    found = pool.map_unordered(lambda actor, task: actor.run.remote(task), list(tasks))
    for done, (name, score, error) in enumerate(found, start=1):
        if error is None:
            scores[name] = score
            progress.update(done, f"{name} {score:.4f}")
        else:
            failed.append(f"{name}: {error}")
            progress.update(done, f"{name} failed")
    if failed:
        raise RunError("\n".join(["mteb: these tasks failed, the others are written", *sorted(failed)]))
    return dict(sorted(scores.items()))


def _on_disk(place: str) -> str:
    path = Folder.at(place).local
    if path is None:
        raise RunError(f"mteb: {place} is not on a disk; give --model and --output as paths that every node sees")
    return str(path)


def _keep_prompts(output: Path, prompts: str | None) -> None:
    """Writes which instructions the results of a folder are with.

    Others are refused: a result that is there would be taken for one with those that are asked for now.
    """
    file, said = output / PROMPTS_FILE, {"prompts": prompts or OWN}
    if file.is_file():
        there = json.loads(file.read_text())
    else:
        there = {"prompts": OWN} if (output / "results").is_dir() else said
    if there != said:
        raise RunError(
            f"{output}: its results are with the instructions {there['prompts']!r}, and {said['prompts']!r} are "
            "asked for; give another --output"
        )
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(said))


class _Encoder:
    """An actor with the model in memory."""

    def __init__(self, model: str, engine: EngineName) -> None:
        import torch

        from f2llm_ray.engine.engine import Engine

        torch.set_num_threads(1)
        self.engine = Engine(Path(model), engine=engine)

    def embed(self, texts: list[str], file: Path) -> Vectors:
        """The vectors of a piece, which are kept in the file."""
        if file.is_file():
            return np.load(file, allow_pickle=False)
        vectors_nd = self.engine.embed(texts)
        Folder.at(str(file.parent)).write_array(file.name, vectors_nd)
        return vectors_nd


class _Worker:
    """An actor that runs tasks, and asks others for vectors."""

    def __init__(
        self, model: str, output: str, encoders: Sequence[Any], prompts: Mapping[str, str] | None
    ) -> None:
        import mteb

        from f2llm_ray.evaluate.mteb_model import MtebEncoder

        self.encoders, self.turn = list(encoders), 0
        self.model = MtebEncoder(Path(model), self._embed, prompts)
        self.cache = mteb.ResultCache(Path(output))
        self.pieces = self.vectors = Path(output) / "vectors" / str(self.model.mteb_model_meta.revision)

    def _embed(self, texts: Sequence[str]) -> Vectors:
        """The vectors [n, d] of texts, of all encoders in turn."""
        import ray

        waiting = []
        for start in range(0, len(texts), PIECE):
            piece = list(texts[start : start + PIECE])
            name = hashlib.sha256(json.dumps(piece).encode()).hexdigest()
            encoder = self.encoders[self.turn % len(self.encoders)]
            self.turn += 1
            waiting.append(encoder.embed.remote(piece, self.pieces / f"{name}.npy"))
        return np.concatenate(ray.get(waiting))

    def run(self, task: AbsTask) -> tuple[str, float, str | None]:
        """The task's name, its main score, and what went wrong, in one line."""
        import mteb

        name = task.metadata.name
        self.pieces = self.vectors / name
        self.pieces.mkdir(parents=True, exist_ok=True)
        try:
            result: Any = mteb.evaluate(
                self.model, task, cache=self.cache, show_progress_bar=False, co2_tracker=False
            )
            # A file of an earlier run may hold more subsets than are asked for now.
            (found,) = result.task_results
            score = float(found.validate_and_filter_scores(task).get_score())
        except Exception as error:  # noqa: BLE001 -- of any kind: the other tasks go on, and all errors are raised at the end
            return name, 0.0, " ".join(f"{type(error).__name__}: {error}".split())[:300]
        shutil.rmtree(self.pieces)
        return name, score, None
