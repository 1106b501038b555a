"""The stages of a recipe as a graph: what each is made of, who makes it, and what must be there before.

Nothing else knows an order or a name of stages: the walk, jobs, report and error messages follow this graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from f2llm_ray.base.errors import RunError
from f2llm_ray.evaluate.settings import BM25
from f2llm_ray.recipe.recipe import UNTRAINED, Recipe
from f2llm_ray.run.stage import Stage

Kind = Literal["untrained", "train", "prune", "distill", "merge", "int8"]


@dataclass(frozen=True)
class Model:
    """A model of the run."""

    name: str
    kind: Kind
    """How it is made."""
    stage: Stage
    made_from: str | None
    """The model it is made from; None for the backbone."""
    sources: tuple[str, ...]
    """The sources that it, or a model that it is made from, was trained on, in the recipe's order."""


@dataclass(frozen=True)
class Mixed:
    """A measurement of a model's queries against another model's passages."""

    teacher: str
    """The other model, as reports call it."""
    stage: Stage


@dataclass(frozen=True, kw_only=True)
class Graph:
    """All stages of a recipe in a root."""

    recipe: Recipe
    prepare: Stage
    mined: Stage | None
    models: dict[str, Model]
    """In the order they are made."""
    sets: dict[str, Stage]
    """What each evaluation set is made of."""
    overlaps: dict[str, Stage]
    """For each set that the training rows are not screened for: how much of it is in them."""
    evaluations: dict[tuple[str, str], Stage]
    """By set, and the name of a model of the run, of an exit, of a baseline, or `BM25`."""
    exits: dict[str, tuple[str, int]]
    """The exits that are measured, by name: the model, and how many of its layers."""
    speeds: dict[str, Stage]
    """By model: how long it takes for a query."""
    mixed: dict[tuple[str, str], Mixed]
    """By model that ends in a teacher's space, and retrieval set: its queries against the teacher's passages."""

    def stages(self) -> list[Stage]:
        """All stages, each after those that it needs."""
        ends = (self.prepare, *(model.stage for model in self.models.values()))
        ends = (*ends, *self.overlaps.values(), *self.measurements)
        return list({found.folder_name: found for end in ends for found in (*end.before(), end)}.values())

    @property
    def measurements(self) -> tuple[Stage, ...]:
        """The stages that measure models, which no other stage needs."""
        mixed = (found.stage for found in self.mixed.values())
        return (*self.evaluations.values(), *self.speeds.values(), *mixed)

    def making(self, end: Stage | None = None) -> list[Stage]:
        """The stages that measure nothing, each after those that it needs; up to one of them where it is given."""
        measured = {stage.folder_name for stage in self.measurements}
        making = {name: stage for stage in self.stages() if (name := stage.folder_name) not in measured}
        last = len(making) if end is None else list(making).index(end.folder_name) + 1
        return list(making.values())[:last]

    def of_job(self, job: str) -> list[Stage]:
        """The stages that a job makes, in their order.

        Raises:
            RunError: none.
        """
        found = [stage for stage in self.stages() if stage.job == job]
        if not found:
            raise RunError(f"recipe {self.recipe.name!r} has nothing for `f2llm {job}`")
        return found

    def model(self, name: str) -> Model:
        """A model by its name.

        Raises:
            RunError: the recipe makes none of this name.
        """
        if name not in self.models:
            raise RunError(f"recipe {self.recipe.name!r} makes no model {name!r}; it makes {list(self.models)}")
        return self.models[name]

    @property
    def measured(self) -> dict[str, str]:
        """What is measured beside the run's models by its name: "bm25", "backbone" or "model"."""
        found = {BM25: "bm25"} if self.recipe.evaluation.bm25 else {}
        if self.recipe.backbone.path is not None:
            found[UNTRAINED] = "backbone"
        return {**found, **dict.fromkeys(self.recipe.evaluation.models, "model")}

    def served(self) -> Model:
        """The model that the recipe serves: the one it names, or the last one."""
        return self.models[self.recipe.serving.model or list(self.models)[-1]]
