"""A recipe run from Python, and what came of it."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f2llm_ray.api.model import Model, load
from f2llm_ray.base import formatting
from f2llm_ray.base.errors import ArgumentError

if TYPE_CHECKING:
    from f2llm_ray.pipeline.walk import Pipeline

RecipeLike = str | Path | Mapping[str, Any]
"""A built-in recipe's name, a YAML file, or settings as such a file has them."""


@dataclass(frozen=True)
class RunResult:
    """A finished run. A notebook shows it as a table, `print` as text."""

    root: str
    """Its folder or URI."""
    report: dict[str, Any]
    """What report.json holds; docs/evaluation.md explains its keys."""

    @property
    def models(self) -> dict[str, str]:
        """The folder of each model by its name, in the order in which they were made."""
        return {model["name"]: f"{self.root}/{model['folder']}" for model in self.report["models"]}

    @property
    def report_html(self) -> str:
        """The report as a page."""
        return f"{self.root}/report.html"

    def load(self, name: str | None = None) -> Model:
        """Loads a model of the run: by its name, or the one that the recipe serves.

        Raises:
            ArgumentError: the run has none of this name.
        """
        name = name or self.report["serving"]["model"]
        if name not in self.models:
            raise ArgumentError(f"model: found {name!r}, expected one of {', '.join(self.models)}")
        return load(self.models[name])

    def __str__(self) -> str:
        from f2llm_ray.report.terminal import terminal_table

        return terminal_table(self.report)

    def _repr_html_(self) -> str:
        """The models and their main score on each set, at the whole dim."""
        from f2llm_ray.report.read_scores import at_full, main_metric, sets_of

        models = self.report["models"]
        metrics = {name: main_metric(models, name) for name in sets_of(models)}
        heads = ["model", "parameters", *(f"{name}, {metric}" for name, metric in metrics.items())]
        rows = []
        for model in models:
            scores = [formatting.score(at_full(model, name)) for name in metrics]
            rows.append([model["name"], formatting.size(model.get("parameters")), *scores])
        lines = [_row("th", heads), *(_row("td", row) for row in rows)]
        return f"<table>{''.join(lines)}</table><p>{html.escape(self.report_html)}</p>"


def run_recipe(recipe: RecipeLike, root: str | Path, *, rescreen: bool = False, **changes: Any) -> RunResult:
    """Runs all stages of a recipe, as `f2llm run` does: finished ones are skipped, an interrupted one goes on.

    It joins the Ray cluster that RAY_ADDRESS names, or starts one that ends with this process.

    Args:
        recipe: a built-in recipe's name, a YAML file, or a mapping of settings, which may say `extends`.
        root: the run's folder or URI.
        rescreen: prepare the data again where evaluation sets came after them.
        changes: sections that are laid over the recipe, such as `data={"max_tokens": 128}`; None removes a key.

    Raises:
        RecipeError: the recipe does not fit.
        DataError: a file that cannot be read, or a row that is wrong.
        RunError: the root cannot be used, or a stage failed.
    """
    from f2llm_ray.api.plainly import plainly
    from f2llm_ray.base.session import connect

    pipeline = _pipeline(recipe, root, rescreen=rescreen, changes=changes)
    connect()
    with plainly():
        report = pipeline.everything()
    return RunResult(pipeline.run.root.uri, report)


def evaluate_model(
    model: Model | str | Path, recipe: RecipeLike, root: str | Path, **changes: Any
) -> dict[str, dict[str, dict[str, float]]]:
    """Measures a model on a recipe's evaluation sets, as `f2llm evaluate --model` does.

    Args:
        model: a model or its folder, ours or of sentence-transformers.
        recipe: whose `evaluation.sets` are measured; see `run_recipe`.
        root: where the sets are kept once they are made.
        changes: sections that are laid over the recipe, such as `evaluation={"sets": {...}}`.

    Returns:
        Scores by set, dim and metric.

    Raises:
        RecipeError, DataError, RunError: as `run_recipe`.
    """
    from f2llm_ray.api.plainly import plainly
    from f2llm_ray.base.session import connect

    pipeline = _pipeline(recipe, root, rescreen=False, changes=changes)
    if not pipeline.graph.sets:
        raise ArgumentError(f"recipe {pipeline.recipe.name!r}: has no evaluation.sets to measure a model on")
    connect()
    with plainly():
        return pipeline.evaluate_folder(model.uri if isinstance(model, Model) else str(model))


def _pipeline(recipe: RecipeLike, root: str | Path, *, rescreen: bool, changes: Mapping[str, Any]) -> Pipeline:
    from f2llm_ray.pipeline.walk import Pipeline
    from f2llm_ray.recipe.files import load_recipe

    loaded = load_recipe(str(recipe) if isinstance(recipe, str | Path) else recipe, changes=changes)
    return Pipeline(loaded, str(root), rescreen=rescreen)


def _row(tag: str, cells: list[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"
