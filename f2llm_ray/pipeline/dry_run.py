"""What a run would do, said before it does anything: which stages are there, which would run, and why."""

from __future__ import annotations

from collections.abc import Iterable

from f2llm_ray.base import formatting
from f2llm_ray.base.errors import DataError
from f2llm_ray.data.reading import Source
from f2llm_ray.data.reading.datasets import DatasetsSource
from f2llm_ray.data.reading.files import TableSource
from f2llm_ray.evaluate.settings import SourceSet
from f2llm_ray.evaluate.tasks.labelled import LabelledFile
from f2llm_ray.evaluate.tasks.registry import LABELLED, files_of
from f2llm_ray.pipeline.graph import Graph
from f2llm_ray.pipeline.walk import reasons, replaced_report
from f2llm_ray.run.root import Run
from f2llm_ray.run.stage import Stage
from f2llm_ray.train.settings import TrainStage


def dry_run(graph: Graph, run: Run, stages: Iterable[Stage]) -> list[str]:
    """A line for each of the stages and of those that they need, each after what it needs."""
    wanted = {found.folder_name: found for end in stages for found in (*end.before(), end)}
    missing = {name for name, stage in wanted.items() if run.manifest(stage) is None}
    lines = []
    for name, stage in wanted.items():
        if name not in missing:
            lines.append(f"{stage.name}: there ({name})")
            continue
        hours = _hours(graph, stage)
        time = "" if hours is None else f", {formatting.duration(3600 * hours)}"
        lines.append(f"{stage.name}: would run, {_why(run, stage, missing)}{time}")
    return lines


def check_columns(graph: Graph, run: Run, stages: Iterable[Stage]) -> list[str]:
    """Looks for the columns that the recipe names in what the stages would read, in the head of a file of each.

    Returns:
        What could not be looked at, and why.

    Raises:
        DataError: a column is not there.
    """
    wanted = {found.folder_name for end in stages for found in (*end.before(), end)}
    recipe, notes = graph.recipe, []
    for name, source in recipe.sources.items() if _missing(run, graph.prepare, wanted) else ():
        notes.append(source.check_columns(name))
    for name, found in recipe.evaluation.sets.items():
        if not _missing(run, graph.sets[name], wanted):
            continue
        if isinstance(found, SourceSet):
            notes.append(found.source.check_columns(name))
        elif isinstance(found, LabelledFile):
            LABELLED[found.kind].check_columns(files_of(found))
    return [note for note in notes if note is not None]


def _missing(run: Run, stage: Stage, wanted: Iterable[str]) -> bool:
    return stage.folder_name in wanted and run.manifest(stage) is None


def overview(graph: Graph, run: Run) -> list[str]:
    """What a whole run reads, how long it trains, and where its results go."""
    recipe = graph.recipe
    lines = [f"reads {name}: {_read(name, source)}" for name, source in recipe.sources.items()]
    for name, found in recipe.evaluation.sets.items():
        line = f"measures on {name}"
        if isinstance(found, SourceSet):
            line += f": {_read(name, found.source)}"
            line += f", {found.passages:,} passages of them" if found.passages else ""
        lines.append(line)
    if not recipe.evaluation.sets:
        lines.append("measures on nothing: evaluation.sets is empty, so that the report will have no scores")
    for name, step in recipe.steps().items():
        if isinstance(step, TrainStage):
            lines.append(f"trains {name}: {_length(step)} of {step.global_batch * step.accumulate:,} rows")
    served = graph.served()
    if all(run.manifest(stage) is not None for stage in graph.stages()):
        lines = ["all stages are there: a run would only write the report again"]
    other = replaced_report(recipe, run)
    return [
        *lines,
        *([] if other is None else [other]),
        f"writes {run.root.uri}/report.html, and the model to serve to {run.folder(served.stage).uri}/model",
    ]


def _read(name: str, source: Source) -> str:
    """What is read of a source: files and their size, where it has such, and which columns."""
    try:
        files = source.inputs(name)
    except DataError:
        return f"{source.format}, gone by now"
    parts: list[str] = [source.format]
    sizes = [file.size for file in files if not file.version]
    parts += [formatting.plural(len(sizes), "file")] if sizes else []
    known = [size for size in sizes if size is not None]
    parts += [formatting.byte_size(sum(known))] if known and len(known) == len(sizes) else []
    if isinstance(source, TableSource | DatasetsSource):
        said = source.columns.model_dump(exclude_none=True)
        parts += [f"{role} from {column!r}" for role, column in said.items() if isinstance(column, str)]
    return ", ".join(parts)


def _length(step: TrainStage) -> str:
    if step.max_steps is not None:
        return formatting.plural(step.max_steps, "step")
    if step.max_minutes is not None:
        return f"in {step.max_minutes:g} minutes as many steps as fit, each"
    return f"{formatting.plural(step.epochs, 'epoch')} in steps"


def _why(run: Run, stage: Stage, missing: set[str]) -> str:
    again = [f"{parent.name} runs again" for parent in stage.parents.values() if parent.folder_name in missing]
    found = [why for why in reasons(run, stage) if not why.endswith(" is another one")]
    if not found and again and next(run.manifests(stage.name), None) is not None:
        return "; ".join(again)
    return "; ".join(found) or "not made yet"


def _hours(graph: Graph, stage: Stage) -> float | None:
    """Hours of a training on GPUs, where the planner can tell."""
    from f2llm_ray.plan.cost import stage_hours
    from f2llm_ray.plan.stage_work import Cluster, training_stages

    recipe = graph.recipe
    if stage.name not in training_stages(recipe):
        return None
    return stage_hours(recipe, stage.name, Cluster(gpus_per_node=recipe.compute.workers))
