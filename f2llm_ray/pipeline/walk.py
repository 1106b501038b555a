"""The walk over a recipe's graph: what is finished is skipped, what is missing is made, each stage says which."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from f2llm_ray.base import formatting
from f2llm_ray.base.progress import say
from f2llm_ray.pipeline.declare import declare
from f2llm_ray.pipeline.graph import Graph, Model
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.root import Run
from f2llm_ray.run.stage import Stage, changes

REASONS = 3
"""Changes that a stage names when it starts."""


class Pipeline:
    """Makes stages of a recipe in a root.

    Args:
        recipe: the recipe.
        root: local path or URI of the run's root.
        rescreen: prepare data again where evaluation sets came after them (`declare`).
    """

    def __init__(self, recipe: Recipe, root: str, *, rescreen: bool = False) -> None:
        self.recipe, self.run = recipe, Run(root)
        self.graph: Graph = declare(recipe, self.run, rescreen=rescreen)
        self._told: set[str] = set()

    def everything(self) -> dict[str, Any]:
        """Makes and evaluates every model, and returns the report."""
        self.make()
        return self.report()

    def make(self) -> None:
        """Makes and evaluates every model of the recipe."""
        for stage in self.graph.stages():
            if stage not in self.graph.evaluations.values():
                self._make(stage)
        self.evaluate()

    def job(self, job: str, only: str | None = None) -> None:
        """Makes the stages of a job; those that it needs from other jobs must be finished.

        Args:
            job: such as "train".
            only: the name of one of its stages; all of them when unset.

        Raises:
            RunError: the recipe has nothing for the job, or a stage of another job is not finished.
        """
        stages = [stage for stage in self.graph.of_job(job) if only is None or stage.name.startswith(only)]
        for stage in stages:
            self.stage(stage)

    def stage(self, stage: Stage) -> None:
        """Makes one stage, and those before it that are made by whoever needs them.

        Raises:
            RunError: a stage before it, of a job of its own, is not finished.
        """
        if self._finished(stage):
            return
        for before in (*stage.needs, *stage.parents.values()):
            if before.implied or before.job == stage.job:
                self.stage(before)
            elif not self._finished(before):
                self.run.require(before)
        self._make(stage)

    def model(self, name: str) -> None:
        """Makes one model by its name, such as "untrained" or that of a step.

        Raises:
            RunError: the recipe has no such model, or what it is made from is not finished.
        """
        self.stage(self.graph.model(name).stage)

    def evaluate(self) -> None:
        """Measures every finished model on every set that it was not measured on, models side by side."""
        import ray

        from f2llm_ray.evaluate.measure import measure_folder

        waiting = {model.name: self._unmeasured(model) for model in self.graph.models.values()}
        waiting = {name: sets for name, sets in waiting.items() if sets}
        there = sum(self.run.manifest(stage) is not None for stage in self.graph.evaluations.values())
        if there:
            say(f"evaluate: {formatting.plural(there, 'evaluation')} finished before, skipped")
        for name in dict.fromkeys(name for sets in waiting.values() for name in sets):
            self.stage(self.graph.sets[name])
        for stage in self.graph.overlaps.values():
            self.stage(stage)
        self._say_overlaps()
        if not waiting:
            return
        work = ray.remote(num_cpus=1, num_gpus=1 if self.recipe.compute.gpus_per_worker else 0)(measure_folder)
        started, pending = time.time(), {}
        for name, sets in waiting.items():
            folder = self.run.folder(self.graph.models[name].stage) / "model"
            found = {other: self.run.folder(self.graph.sets[other]) for other in sets}
            out = {other: self.run.folder(stage) for other, stage in sets.items()}
            say(f"evaluate {name}: started, on {', '.join(sets)}")
            pending[work.remote(folder, found, self.recipe.evaluation.divisors, out)] = name
        while pending:
            (done,), _ = ray.wait(list(pending))
            name = pending.pop(done)
            measured = ray.get(done)
            for other, stage in waiting[name].items():
                facts = {"result": measured["results"][other], "query_ms": measured["query_ms"]}
                seconds = measured["results"][other]["seconds"]
                self.run.finish(stage, started=started, **facts, seconds=seconds)
            say(f"evaluate {name}: finished in {measured['seconds']:.0f} s")

    def evaluate_folder(self, model: str) -> dict[str, Any]:
        """Scores of any model folder on the recipe's sets, by set and dim."""
        from f2llm_ray.evaluate.measure import measure_folder
        from f2llm_ray.pipeline.work import on_worker

        found = on_worker(
            measure_folder,
            Folder.at(model),
            self.set_folders(),
            self.recipe.evaluation.divisors,
            compute=self.recipe.compute,
        )
        return {name: result["scores"] for name, result in found["results"].items()}

    def set_folders(self) -> dict[str, Folder]:
        """The folders of the evaluation sets by name; those that are not there are made."""
        for stage in self.graph.sets.values():
            self.stage(stage)
        return {name: self.run.folder(stage) for name, stage in self.graph.sets.items()}

    def served_model(self) -> Folder:
        """Folder of the model that the recipe serves: the one it names, or the last one it makes.

        Raises:
            RunError: it is not finished.
        """
        return self.run.require(self.graph.served().stage) / "model"

    def report(self) -> dict[str, Any]:
        """Collects the finished stages into report.json and report.html.

        Raises:
            RunError: the data steps are not finished.
        """
        from f2llm_ray.pipeline.collect import collect, refresh_card
        from f2llm_ray.report.report import write_report

        prepared = self.run.require(self.graph.prepare)
        report = collect(self.graph, self.run)
        write_report(self.run.root, report)
        refresh_card(self.recipe, prepared)
        return report

    # Running and skipping.

    def _make(self, stage: Stage) -> None:
        if self._finished(stage):
            return
        why = reasons(self.run, stage)
        say(f"{stage.name}: started" + (f" ({_brief(why)})" if why else ""))
        started = time.time()
        folder = self.run.folder(stage)
        folder.create()
        manifest = self.run.finish(stage, started=started, **stage.work(folder))
        say(f"{stage.name}: finished in {manifest['seconds']:.0f} s")

    def _finished(self, stage: Stage) -> bool:
        manifest = self.run.manifest(stage)
        if manifest is None:
            return False
        if stage.accept is not None:
            stage.accept(manifest)
        if stage.folder_name not in self._told:
            self._told.add(stage.folder_name)
            say(f"{stage.name}: finished before, skipped ({stage.folder_name})")
        return True

    def _unmeasured(self, model: Model) -> dict[str, Stage]:
        """The evaluations of a model that are missing, by set; none where the model is not finished."""
        if self.run.manifest(model.stage) is None:
            return {}
        found = {name: self.graph.evaluations[model.name, name] for name in self.graph.sets}
        return {name: stage for name, stage in found.items() if self.run.manifest(stage) is None}

    def _say_overlaps(self) -> None:
        for name, stage in self.graph.overlaps.items():
            facts = self.run.manifest(stage)
            if facts is not None and self.recipe.evaluation.sets[name].screen:
                say(
                    f"{name}: came after the data were prepared and is measured as it is; {facts['rows']:,} "
                    f"training rows hold a text of it, {facts['queries']:,} of its {facts['of']:,} queries. "
                    "--rescreen takes those rows out, and trains again"
                )


def reasons(run: Run, stage: Stage) -> list[str]:
    """Why a stage that is not finished is to run, where another one of its name is: what changed since."""
    manifest = next(run.manifests(stage.name), None)
    return [] if manifest is None else changes(manifest, stage)


def _brief(why: Iterable[str]) -> str:
    found = list(why)
    more = [f"and {len(found) - REASONS} more changes"] if len(found) > REASONS else []
    return "; ".join([*found[:REASONS], *more])
