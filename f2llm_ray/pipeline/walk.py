"""The walk over a recipe's graph: what is finished is skipped, what is missing is made, each stage says which."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from f2llm_ray.base import formatting
from f2llm_ray.base.progress import say
from f2llm_ray.evaluate.bm25 import index_cost
from f2llm_ray.evaluate.settings import BM25
from f2llm_ray.pipeline.baselines import baseline_place
from f2llm_ray.pipeline.declare import declare
from f2llm_ray.pipeline.graph import Graph
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.root import REPORT, Run
from f2llm_ray.run.stage import Stage, changes
from f2llm_ray.train.settings import Distill, is_endpoint

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
        """Makes and evaluates every model, and returns the report; says so where it replaces another run's."""
        other = replaced_report(self.recipe, self.run)
        if other is not None:
            say(other)
        self.make()
        return self.report()

    def make(self) -> None:
        """Makes and evaluates every model of the recipe."""
        for stage in self.graph.making():
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
        """Measures what was not measured yet.

        Finished models, baselines and BM25 are measured side by side, then the speed of each model by itself.
        """
        waiting = self._unmeasured()
        there = sum(self.run.manifest(stage) is not None for stage in self.graph.evaluations.values())
        if there:
            say(f"evaluate: {formatting.plural(there, 'evaluation')} finished before, skipped")
        for name in dict.fromkeys(name for sets in waiting.values() for name in sets):
            self.stage(self.graph.sets[name])
        for stage in self.graph.overlaps.values():
            self.stage(stage)
        self._say_overlaps()
        self._measure(waiting)
        for name, stage in self.graph.speeds.items():
            if self.run.manifest(self.graph.models[name].stage) is not None and self.run.manifest(stage) is None:
                self.stage(stage)
        self._mix()

    def _mix(self) -> None:
        """Measures the queries of models that end in a teacher's space against the teacher's passages."""
        for (name, _), mixed in self.graph.mixed.items():
            made = self.run.manifest(self.graph.models[name].stage) is not None
            if made and self.run.manifest(mixed.stage) is None:
                self.stage(mixed.stage)
        for name, step in self.recipe.steps().items():
            if isinstance(step, Distill) and step.joins_teacher and not step.teaches_by_model:
                say(f"{name}: its queries are not measured on its teacher's passages: {step.teacher} is no model")

    def _measure(self, waiting: Mapping[str, Mapping[str, Stage]]) -> None:
        """Measures models, baselines and BM25 on sets: in Ray tasks, endpoints from here, where the key is."""
        import ray

        from f2llm_ray.engine.other_models import RemoteModel
        from f2llm_ray.evaluate.measure import measure, measure_bm25, measure_folder

        gpus, divisors = 1 if self.recipe.compute.gpus_per_worker else 0, self.recipe.evaluation.divisors
        of_folder = ray.remote(num_cpus=1, num_gpus=gpus)(measure_folder)
        of_bm25 = ray.remote(num_cpus=1)(measure_bm25)
        started, pending = time.time(), {}
        others = self.recipe.evaluation.models
        for name, sets in waiting.items():
            say(f"evaluate {name}: started, on {', '.join(sets)}")
            found = {other: self.run.folder(self.graph.sets[other]) for other in sets}
            out = {other: self.run.folder(stage) for other, stage in sets.items()}
            if name == BM25:
                self._say_cost(sets)
                pending[of_bm25.remote(found, out)] = name
            elif not is_endpoint(others.get(name, "")):
                model, layers = self.graph.exits.get(name, (name, None))
                folder = baseline_place(others[name]) if name in others else self._folder_of(model)
                pending[of_folder.remote(folder, found, divisors, out, self.recipe.compute.engine, layers)] = name
        while pending:
            (done,), _ = ray.wait(list(pending))
            name = pending.pop(done)
            found = ray.get(done)
            self._measured(name, waiting[name], found["results"], started, found.get("engine"))
        for name in (name for name in waiting if is_endpoint(others.get(name, ""))):
            started, sets = time.time(), waiting[name]
            found = {other: self.run.folder(self.graph.sets[other]) for other in sets}
            out = {other: self.run.folder(stage) for other, stage in sets.items()}
            self._measured(name, sets, measure(RemoteModel(others[name]), found, divisors, out), started)

    def _say_cost(self, sets: Iterable[str]) -> None:
        for name in sets:
            facts = self.run.manifest(self.graph.sets[name]) or {}
            cost = index_cost(facts.get("passages", 0), facts.get("characters", 0))
            if cost is not None:
                say(f"evaluate bm25: the index of {name}'s {cost}; evaluation.bm25=false leaves it out")

    def _measured(
        self,
        name: str,
        sets: Mapping[str, Stage],
        results: Mapping[str, Any],
        started: float,
        engine: str | None = None,
    ) -> None:
        for other, stage in sets.items():
            self.run.finish(stage, started=started, result=results[other], seconds=results[other]["seconds"])
        by = "" if engine is None else f", by {engine}"
        say(f"evaluate {name}: finished in {sum(result['seconds'] for result in results.values()):.0f} s{by}")

    def _folder_of(self, model: str) -> Folder:
        return self.run.folder(self.graph.models[model].stage) / "model"

    def evaluate_folder(self, model: str) -> dict[str, Any]:
        """Scores of any model folder on the recipe's sets, by set and dim."""
        from f2llm_ray.evaluate.measure import measure_folder
        from f2llm_ray.pipeline.work import on_worker

        found = on_worker(
            measure_folder,
            Folder.at(model),
            self.set_folders(),
            self.recipe.evaluation.divisors,
            engine=self.recipe.compute.engine,
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
        try:
            facts = stage.work(folder)
        except BaseException:
            self.run.cut_off(stage, started=started)
            raise
        manifest = self.run.finish(stage, started=started, **facts)
        self._told.add(stage.folder_name)  # what this run made, it does not call finished before
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

    def _unmeasured(self) -> dict[str, dict[str, Stage]]:
        """The evaluations that are missing, by what is measured and set; none of models that are not finished."""
        models = self.graph.models
        unfinished = {name for name, model in models.items() if self.run.manifest(model.stage) is None}
        found: dict[str, dict[str, Stage]] = {}
        for (name, other), stage in self.graph.evaluations.items():
            model, _ = self.graph.exits.get(name, (name, None))
            if model not in unfinished and self.run.manifest(stage) is None:
                found.setdefault(name, {})[other] = stage
        return found

    def _say_overlaps(self) -> None:
        for name, stage in self.graph.overlaps.items():
            facts = self.run.manifest(stage)
            if facts is not None and self.recipe.evaluation.sets[name].screen:
                say(
                    f"{name}: came after the data were prepared and is measured as it is; {facts['rows']:,} "
                    f"training rows hold a text of it, {facts['queries']:,} of its {facts['of']:,} queries. "
                    "--rescreen takes those rows out, and trains again"
                )


def replaced_report(recipe: Recipe, run: Run) -> str | None:
    """A line on the run whose report is in the root, where the recipe has another name; None where it has not."""
    if not run.root.exists(REPORT):
        return None
    name = run.root.read_json(REPORT).get("name")
    if name == recipe.name:
        return None
    return (
        f"{run.root.uri} holds the run {name!r}: the report of {recipe.name!r} replaces its report.html and "
        "report.json, its finished stages stay; with another --root both reports are kept"
    )


def reasons(run: Run, stage: Stage) -> list[str]:
    """Why a stage that is not finished is to run, where another one of its name is: what changed since."""
    manifest = next(run.manifests(stage.name), None)
    return [] if manifest is None else changes(manifest, stage)


def _brief(why: Iterable[str]) -> str:
    found = list(why)
    more = [f"and {len(found) - REASONS} more changes"] if len(found) > REASONS else []
    return "; ".join([*found[:REASONS], *more])
