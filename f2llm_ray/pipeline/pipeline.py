"""The pipeline: which stages of a recipe run when; `work` is what each does.

prepare -> untrained -> (contrastive stages) -> importance -> pruned -> distilled, and an evaluation of every
model. Where the recipe mines hard negatives, that stage comes after the model that mines, and all later training
uses it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from f2llm_ray.base.errors import RunError
from f2llm_ray.base.progress import say
from f2llm_ray.pipeline.stages import DISTILLED, IMPORTANCE, INT8, MERGED, MINED, TAUGHT, plan
from f2llm_ray.pipeline.work import Work
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder, Run, Stage


class Pipeline:
    """Runs stages of a recipe in a root; a finished stage is skipped and says so."""

    def __init__(self, recipe: Recipe, root: str) -> None:
        self.recipe, self.run, self.plan = recipe, Run(root), plan(recipe)
        self.work = Work(self.recipe, self.run, self.plan)

    def everything(self) -> dict[str, Any]:
        """Runs all stages and returns the report."""
        self.make()
        return self.report()

    def make(self) -> None:
        """Makes and evaluates every model of the recipe."""
        self.prepare()
        for name in self.plan.models:
            self.model(name)
        self.evaluate()

    def prepare(self) -> None:
        """Runs the data steps."""
        self._stage(self.plan.prepare, self.work.prepare)

    def mine(self) -> None:
        """Mines hard negatives; what mines must be finished.

        Raises:
            RunError: the recipe has no `mine`, or the model that mines is not finished.
        """
        if self.plan.mined is None:
            raise RunError(f"recipe {self.recipe.name!r} has no section mine")
        self._stage(self.plan.mined, self.work.mine)

    def teach(self) -> None:
        """Computes the teacher's vectors for the distillation; the teacher must be finished.

        Raises:
            RunError: the recipe has no cached teacher, or it is not finished.
        """
        if self.plan.taught is None:
            raise RunError(f"recipe {self.recipe.name!r} has no distill whose teacher_vectors are cached")
        if self.plan.mined in self.plan.taught.parents:
            self.mine()
        self._stage(self.plan.taught, self.work.teach)

    def model(self, name: str) -> None:
        """Makes one model by its name in the plan, such as "untrained", that of a contrastive stage, "distilled".

        Negatives are mined first where it trains on them, and so are a cached teacher's vectors computed.

        Raises:
            RunError: what it is made from is not finished, or the recipe has no such model.
        """
        if name not in self.plan.models:
            raise RunError(
                f"recipe {self.recipe.name!r} makes no model {name!r}; it makes {list(self.plan.models)}"
            )
        if self.plan.mined in self.plan.models[name].parents:
            self.mine()
        if name == DISTILLED and self.plan.taught is not None:
            self.teach()
        if name == "pruned" and self.plan.importance is not None:
            self._stage(self.plan.importance, self.work.score)
        self._stage(self.plan.models[name], partial(self.work.make, name))

    def train(self, name: str) -> None:
        """Runs one training by the name of its model, and merges its checkpoints where the recipe says so."""
        self.model(name)
        if name + MERGED in self.plan.models:
            self.model(name + MERGED)

    def evaluate(self) -> None:
        """Measures every model that is finished and not measured yet, side by side."""
        import ray

        from f2llm_ray.evaluate.measure import measure_folder
        from f2llm_ray.evaluate.speed import search_ms
        from f2llm_ray.model.checkpoint import read_info

        waiting = [
            (self.plan.evaluations[name], model)
            for name, model in self.plan.models.items()
            if name in self.plan.evaluations
            and self.run.manifest(model) is not None
            and not self._finished(self.plan.evaluations[name])
        ]
        if not waiting:
            return
        work = self.work.task(measure_folder)
        sets = self.run.folder(self.plan.prepare) / "sets"
        for stage, _ in waiting:
            say(f"{stage.name}: started")
        started = time.time()
        dims = {stage.name: read_info(self.run.folder(model) / "model").dims for stage, model in waiting}
        # Before the models are measured, while the machine is quiet, and in a process without torch: it and faiss
        # each bring an OpenMP.
        searches = ray.get(ray.remote(num_cpus=1)(search_ms).remote(sorted(set().union(*dims.values()))))
        pending = {
            work.remote(self.run.folder(model) / "model", sets, self.recipe, self.run.folder(stage)): stage
            for stage, model in waiting
        }
        while pending:
            (done,), _ = ray.wait(list(pending))
            stage = pending.pop(done)
            of_dims = {str(dim): searches[str(dim)] for dim in dims[stage.name]}
            manifest = self.run.finish(stage, started=started, **ray.get(done), search_ms=of_dims)
            say(f"{stage.name}: finished in {manifest['seconds']:.0f} s")

    def evaluate_folder(self, model: str) -> dict[str, Any]:
        """Scores of any model folder on the recipe's sets, by set and dim; the data must be prepared."""
        import ray

        from f2llm_ray.evaluate.measure import measure_folder

        sets = self.run.require(self.plan.prepare, "jobs/prepare.py") / "sets"
        found = ray.get(self.work.task(measure_folder).remote(Folder.at(model), sets, self.recipe))
        return {name: result["scores"] for name, result in found["results"].items()}

    def served_model(self) -> Folder:
        """Folder of the model that the recipe serves: the one it names, or the last one it makes.

        Raises:
            RunError: it is not finished.
        """
        name = self.recipe.serving.model or list(self.plan.models)[-1]
        return self.run.require(self.plan.models[name], _command(name)) / "model"

    def report(self) -> dict[str, Any]:
        """Collects the finished stages into report.json and report.html.

        Raises:
            RunError: the data steps are not finished.
        """
        from f2llm_ray.pipeline.collect import collect
        from f2llm_ray.report.report import write_report

        self.run.require(self.plan.prepare, "jobs/prepare.py")
        report = collect(self.recipe, self.run, self.plan)
        write_report(self.run.root, report)
        return report

    # Running and skipping.

    def _stage(self, stage: Stage, work: Callable[[Folder], dict[str, Any]]) -> None:
        if self._finished(stage):
            return
        for parent in stage.parents:
            self.run.require(parent, _command(parent.name))
        say(f"{stage.name}: started")
        started = time.time()
        folder = self.run.folder(stage)
        folder.create()
        manifest = self.run.finish(stage, started=started, **work(folder))
        say(f"{stage.name}: finished in {manifest['seconds']:.0f} s")

    def _finished(self, stage: Stage) -> bool:
        manifest = self.run.manifest(stage)
        if manifest is not None:
            say(f"{stage.name}: finished before, skipped ({stage.folder_name})")
        return manifest is not None


def _command(stage: str) -> str:
    jobs = {
        "prepare": "jobs/prepare.py",
        MINED: "jobs/mine.py",
        IMPORTANCE: "jobs/prune.py",
        "pruned": "jobs/prune.py",
        TAUGHT: "jobs/teach.py",
        "distilled": "jobs/distill.py",
    }
    if stage.endswith(INT8):
        return "jobs/quantize.py"
    return jobs.get(stage.removesuffix(MERGED), "jobs/train.py")
