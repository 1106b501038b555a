"""Ablations: a table of variants of one recipe, run in one root, so that what they share is done once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from pydantic import Field

from f2llm_ray.base.errors import F2LLMError, RecipeError, plain_error
from f2llm_ray.base.progress import say
from f2llm_ray.base.section import Section
from f2llm_ray.evaluate.differences import differences
from f2llm_ray.evaluate.metrics.scores import same_units
from f2llm_ray.pipeline.collect import collect
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.recipe.files import load_recipe, parse
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.recipe.strict_yaml import read_yaml
from f2llm_ray.report.ablation import rows_of, write_ablation
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.root import device_name

Units = dict[str, pa.Table]
"""What each query of a set scored, by set (`Measured.units`)."""


class Variants(Section):
    """A table of variants: what each changes in the recipe."""

    reference: str | None = None
    """The model of the recipe that variants are compared with; the teacher, or the model that is pruned, when
    unset."""
    variants: dict[str, dict[str, Any] | None] = Field(min_length=1)
    """Changes by the variant's name, laid over the recipe as over one that is extended: null removes a key. A
    variant without changes is the recipe itself."""


@dataclass(frozen=True)
class Ablation:
    """The recipes of all variants, checked."""

    name: str
    """Name of the recipe."""
    reference: str | None
    changes: Mapping[str, Mapping[str, Any]]
    recipes: Mapping[str, Recipe]


def load_ablation(recipe: str, variants: str, overrides: list[str]) -> Ablation:
    """Reads the recipe and all its variants; nothing is run.

    Args:
        recipe: name or path of the recipe that they vary.
        variants: path of a YAML file that holds `Variants`.
        overrides: `key=value` changes that hold for all.

    Raises:
        RecipeError: a file that cannot be read, or a variant that is no recipe; the message names it.
    """
    path = Path(variants)
    try:
        settings = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not a table of variants: {error}") from None
    if not isinstance(settings, dict):
        raise RecipeError(f"{path}: found {type(settings).__name__}, expected a mapping with variants")
    table = parse(Variants, settings, str(path))
    base = load_recipe(recipe, overrides)
    changes = {name: change or {} for name, change in table.variants.items()}
    recipes = {}
    for name, change in changes.items():
        try:
            recipes[name] = load_recipe(recipe, overrides, change)
        except RecipeError as error:
            raise RecipeError(f"{path}: variant {name!r}: {error}") from None
    reference = table.reference or base.reference()
    if table.reference is not None and table.reference not in base.made_from():
        raise RecipeError(f"{path}: reference: {reference!r} is not one of {list(base.made_from())}")
    return Ablation(base.name, reference, changes, recipes)


def ablate(ablation: Ablation, root: str, *, hours: float | None = None) -> dict[str, Any]:
    """Runs the variants one after the other and writes the table after each.

    A second run skips what is finished, as the pipeline does. A variant that fails with an error of ours (a NaN
    loss, say) is reported in the table, and the others go on.

    Args:
        ablation: what is run.
        root: the run's folder; it gets `ablation.json`, `ablation.md` and `ablation.html`.
        hours: no variant begins after so many hours; the table names those left out.

    Returns:
        What ablation.json holds.
    """
    out = Folder.at(root)
    begun = time.monotonic()
    results: dict[str, dict[str, Any]] = {}
    first: Units = {}
    for number, (name, recipe) in enumerate(ablation.recipes.items(), 1):
        if hours is not None and time.monotonic() - begun > hours * 3600:
            results[name] = {"error": f"not begun: {hours:g} h were over"}
            continue
        say(f"variant {number}/{len(ablation.recipes)} {name}: started")
        try:
            found, units = _run(recipe, root)
            first = units if number == 1 else first
            results[name] = {**found, "against_first": _against(first, units)}
        except Exception as error:
            plain: F2LLMError | None = plain_error(error)
            if plain is None:
                raise
            results[name] = {"error": str(plain)}
            say(f"variant {name}: failed: {plain}")
        write_ablation(out, _table(ablation, results))
    table = _table(ablation, results)
    write_ablation(out, table)
    return table


def _run(recipe: Recipe, root: str) -> tuple[dict[str, Any], Units]:
    """Makes and evaluates every model of a variant: what is compared of its report, and the last one's units."""
    pipeline = Pipeline(recipe, root)
    pipeline.make()
    report, graph = collect(pipeline.graph, pipeline.run), pipeline.graph
    last, units = list(graph.models)[-1], Units()
    for name in graph.sets:
        folder = pipeline.run.folder(graph.evaluations[last, name])
        if folder.read_json("manifest.json")["result"]["kind"] == "retrieval":
            units[name] = folder.read_table("units.parquet")
    return {key: report[key] for key in ("models", "training", "seconds")}, units


def _against(first: Units, units: Units) -> dict[str, dict[str, float]]:
    """By set, how far the variant is from the first one; no set where that failed or has other queries."""
    shared = {name: table for name, table in units.items() if name in first and same_units(first[name], table)}
    if first is units or not shared:
        return {}
    kinds = dict.fromkeys(shared, "retrieval")
    rows = differences(kinds, {"first": first, "variant": shared})
    return {row["set"]: {key: row[key] for key in ("difference", "low", "high", "p")} for row in rows}


def _table(ablation: Ablation, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "name": ablation.name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(),
        "reference": ablation.reference,
        "changes": dict(ablation.changes),
        "rows": rows_of(results, ablation.reference),
    }
