"""What a run would do, said before it does anything: which stages are there, which would run, and why."""

from __future__ import annotations

from collections.abc import Iterable

from f2llm_ray.base import formatting
from f2llm_ray.pipeline.graph import Graph
from f2llm_ray.pipeline.walk import reasons
from f2llm_ray.run.root import Run
from f2llm_ray.run.stage import Stage


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
