"""The report of a run, collected from the manifests of its finished stages."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from f2llm_ray.pipeline.stages import DISTILLED, IMPORTANCE, MINED, TAUGHT, Plan
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder, Run, device_name


def _serve_command(root: Folder) -> str:
    quickstart = Path("runs/quickstart").absolute()
    if root.local == quickstart:
        return "serve run serve_configs/quickstart.yaml"
    return f"serve run f2llm_ray.serve.app:build root={root.uri}"


def _reference(recipe: Recipe, stages: Plan) -> str | None:
    """What smaller models are held against: the teacher where it is a model of the run, else what is pruned."""
    if recipe.distill is not None and recipe.distill.teacher in stages.models:
        return recipe.distill.teacher
    return None if recipe.prune is None else recipe.prune.model


def _trained_on(recipe: Recipe, stages: Plan) -> dict[str, list[str]]:
    """By model, the sources whose rows it or the models it is made from were trained on, in the recipe's order."""
    found: dict[str, set[str]] = {}
    for name, stage in stages.models.items():
        made_from = [parent.name for parent in stage.parents if parent.name in found]
        trained = recipe.distill if name == DISTILLED else recipe.stages.get(name)
        found[name] = set(found[made_from[0]] if made_from else ())
        found[name] |= set(() if trained is None else recipe.stage_sources(trained))
    return {name: [source for source in recipe.sources if source in seen] for name, seen in found.items()}


def collect(recipe: Recipe, run: Run, stages: Plan) -> dict[str, Any]:
    """The report of a run from the manifests of its finished stages (design of the keys: docs of the report)."""
    prepared = run.manifest(stages.prepare) or {}
    manifests = {name: run.manifest(stage) for name, stage in stages.models.items()}
    evaluations = {name: run.manifest(stage) for name, stage in stages.evaluations.items()}
    trained_on = _trained_on(recipe, stages)
    models, training, seconds = [], {}, {"prepare": prepared.get("seconds")}
    for name, manifest in manifests.items():
        if manifest is None:
            continue
        measured = evaluations.get(name) or {}
        results = measured.get("results", {})
        speeds: dict[str, Any] = {key: measured[key] for key in ("query_ms", "search_ms") if key in measured}
        seconds[name] = manifest["seconds"]
        if "training" in manifest:
            training[name] = manifest["training"]
        models.append(
            {
                "name": name,
                "folder": f"{stages.models[name].folder_name}/model",
                "sources": trained_on[name],
                **{key: manifest[key] for key in ("parameters", "non_embedding_parameters", "bytes")},
                "scores": {found: result["scores"] for found, result in results.items()},
                "languages": {found: result["languages"] for found, result in results.items()},
                "types": {found: result["types"] for found, result in results.items() if result.get("types")},
                **speeds,
            }
        )
    mined = None if stages.mined is None else run.manifest(stages.mined)
    importance = None if stages.importance is None else run.manifest(stages.importance)
    taught = None if stages.taught is None else run.manifest(stages.taught)
    for stage, manifest in ((MINED, mined), (IMPORTANCE, importance), (TAUGHT, taught)):
        if manifest is not None:
            seconds[stage] = manifest["seconds"]
    seconds |= {stages.evaluations[name].name: m["seconds"] for name, m in evaluations.items() if m is not None}
    served = recipe.serving.model or (models[-1]["name"] if models else None)
    return {
        "name": recipe.name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "root": run.root.uri,
        "device": device_name(),
        "libraries": prepared.get("libraries", {}),
        "rows": prepared.get("rows", []),
        "languages": prepared.get("languages", {}),
        "backbone": recipe.backbone.path,
        "missing": [stage.name for stage in stages.stages() if run.manifest(stage) is None],
        "sources": prepared.get("sources", {}),
        "seconds": seconds,
        "training": training,
        "mining": None if mined is None else mined["mining"],
        "teaching": None if taught is None else taught["teaching"],
        "models": models,
        "reference": _reference(recipe, stages),
        "sets": {
            name: {key: result[key] for key in ("kind", "queries", "corpus")}
            for measured in evaluations.values()
            if measured is not None
            for name, result in measured["results"].items()
        },
        "serving": {**recipe.serving.model_dump(mode="json"), "model": served},
        "commands": {"serve": _serve_command(run.root)},
    }
