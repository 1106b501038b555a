"""The report of a run, collected from the manifests of its finished stages."""

from __future__ import annotations

import shlex
from datetime import datetime, timezone
from typing import Any

from f2llm_ray.evaluate.differences import differences
from f2llm_ray.pipeline.graph import Graph, Model
from f2llm_ray.pipeline.work import CONTAMINATED, source_labels
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.root import Run, device_name
from f2llm_ray.run.stage import Facts

CARD, FAILURES = "card.json", "failures.json"


def collect(graph: Graph, run: Run) -> dict[str, Any]:
    """The report of a run; docs/evaluation.md explains its keys."""
    recipe = graph.recipe
    prepared = run.manifest(graph.prepare) or {}
    found = {model.name: manifest for model in graph.models.values() if (manifest := run.manifest(model.stage))}
    results = {name: _results(graph, run, name) for name in found}
    beside = {name: _results(graph, run, name) for name in graph.measured if name not in graph.models}
    models = [_model(graph, run, graph.models[name], manifest, results[name]) for name, manifest in found.items()]
    manifests = {stage.name: run.manifest(stage) for stage in graph.stages()}
    mined = None if graph.mined is None else manifests[graph.mined.name]
    taught = [manifest["teaching"] for manifest in manifests.values() if manifest and "teaching" in manifest]
    served = recipe.serving.model or (models[-1]["name"] if models else None)
    labels, kept = source_labels(recipe.sources), prepared.get("sources", {})
    return {
        "name": recipe.name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "root": run.root.uri,
        "device": device_name(),
        "libraries": prepared.get("libraries", {}),
        "rows": prepared.get("rows", []),
        "languages": prepared.get("languages", {}),
        "texts": prepared.get("texts"),
        "decontaminated": list(prepared.get("settings", {}).get("mteb", {})),
        "cut_texts": prepared.get("cut_texts", {}),
        "max_tokens": recipe.data.max_tokens,
        "backbone": recipe.backbone.path,
        "missing": [name for name, manifest in manifests.items() if manifest is None],
        "sources": {name: {**facts, **kept[name]} for name, facts in labels.items() if name in kept},
        "seconds": {name: manifest["seconds"] for name, manifest in manifests.items() if manifest is not None},
        "training": {name: manifest["training"] for name, manifest in found.items() if "training" in manifest},
        "mining": None if mined is None else mined["mining"],
        "teaching": taught[-1] if taught else None,
        "models": models,
        "baselines": [_baseline(graph, name, measured) for name, measured in beside.items() if measured],
        "standing": [] if served not in found else _standing(graph, run, served),
        "failures": {} if served not in found else _failures(graph, run, served),
        "reference": recipe.reference(),
        "sets": {
            name: {key: measured["result"][key] for key in ("kind", "queries", "corpus")}
            for of_model in (*results.values(), *beside.values())
            for name, measured in of_model.items()
        },
        "chance": {
            name: manifest["chance"]
            for name, stage in graph.sets.items()
            if "chance" in (manifest := run.manifest(stage) or {})
        },
        "overlap": {
            name: {key: facts[key] for key in ("rows", "queries", "of")}
            for name, stage in graph.overlaps.items()
            if (facts := run.manifest(stage)) is not None
        },
        "serving": {**recipe.serving.model_dump(mode="json"), "model": served},
        "commands": {"serve": _serve_command(run.root)},
    }


def refresh_card(recipe: Recipe, prepared: Folder) -> None:
    """Draws the data card again where names, licences or instructions of sources are others than it says."""
    from f2llm_ray.report.data_card import write_card

    card = prepared.read_json(CARD)
    labels = {"name": recipe.name, "sources": source_labels(recipe.sources)}
    if any(card[key] != value for key, value in labels.items()):
        write_card(prepared, {**card, **labels})


def _results(graph: Graph, run: Run, model: str) -> dict[str, Facts]:
    """The manifests of the finished evaluations of a model, a baseline or BM25, by set."""
    stages = {name: graph.evaluations[model, name] for name in graph.sets if (model, name) in graph.evaluations}
    found = {name: run.manifest(stage) for name, stage in stages.items()}
    return {name: manifest for name, manifest in found.items() if manifest is not None}


def _baseline(graph: Graph, name: str, measured: dict[str, Facts]) -> dict[str, Any]:
    """What is shown of BM25 or a baseline."""
    return {
        "name": name,
        "kind": graph.measured[name],
        "model": graph.recipe.evaluation.models.get(name),
        "scores": {of_set: facts["result"]["scores"] for of_set, facts in measured.items()},
        "languages": {of_set: facts["result"]["languages"] for of_set, facts in measured.items()},
    }


def _standing(graph: Graph, run: Run, served: str) -> list[dict[str, Any]]:
    """How far the served model is from BM25, its backbone and the baselines, on each set that both have.

    Differences are the served model's main metric minus theirs, by paired bootstrap.
    """
    own, rows = _results(graph, run, served), []
    for other in (name for name in graph.measured if name != served):
        theirs = _results(graph, run, other)
        for of_set in (name for name in own if name in theirs):
            units = {
                model: {of_set: run.folder(graph.evaluations[model, of_set]).read_table("units.parquet")}
                for model in (other, served)
            }
            (row,) = differences({of_set: own[of_set]["result"]["kind"]}, units)
            kept = {
                key: row[key] for key in ("set", "model", "against", "difference", "low", "high", "p", "macro")
            }
            rows.append({**kept, "kind": graph.measured[other], "wins": row["wins"], "losses": row["losses"]})
    return rows


def _failures(graph: Graph, run: Run, served: str) -> dict[str, list[dict[str, Any]]]:
    """Queries that the served model fails on, by set; none where there are none."""
    folders = {name: run.folder(graph.evaluations[served, name]) for name in _results(graph, run, served)}
    found = {name: folder.read_json(FAILURES) for name, folder in folders.items() if folder.exists(FAILURES)}
    return {name: failures for name, failures in found.items() if failures}


def _model(graph: Graph, run: Run, model: Model, manifest: Facts, measured: dict[str, Facts]) -> dict[str, Any]:
    results = {name: facts["result"] for name, facts in measured.items()}
    speed = run.manifest(graph.speeds[model.name]) if model.name in graph.speeds else None
    exits = {
        str(layers): _results(graph, run, cut) for cut, (of, layers) in graph.exits.items() if of == model.name
    }
    clean = {name: _clean(graph, run, model.name, name) for name in results if name in graph.overlaps}
    return {
        "name": model.name,
        "kind": model.kind,
        "made_from": model.made_from,
        "folder": f"{model.stage.folder_name}/model",
        "sources": list(model.sources),
        **{key: manifest[key] for key in ("parameters", "non_embedding_parameters", "bytes")},
        "layers": manifest.get("layers"),
        "scores": {name: result["scores"] for name, result in results.items()},
        "exits": {
            layers: {name: facts["result"]["scores"] for name, facts in found.items()}
            for layers, found in exits.items()
            if found
        },
        "languages": {name: result["languages"] for name, result in results.items()},
        "types": {name: result["types"] for name, result in results.items() if result.get("types")},
        **({"clean": {name: scores for name, scores in clean.items() if scores}} if any(clean.values()) else {}),
        **_mixed(graph, run, model.name),
        **({} if speed is None else {"query_ms": speed["query_ms"]}),
    }


def _mixed(graph: Graph, run: Run, model: str) -> dict[str, Any]:
    """Scores of a model's queries against the passages of the teacher in whose space it ends, where measured."""
    found = {name: mixed for (other, name), mixed in graph.mixed.items() if other == model}
    done = {name: manifest for name, mixed in found.items() if (manifest := run.manifest(mixed.stage)) is not None}
    if not done:
        return {}
    scores = {name: manifest["result"]["scores"] for name, manifest in done.items()}
    return {"mixed": {"teacher": next(iter(found.values())).teacher, "scores": scores}}


def _clean(graph: Graph, run: Run, model: str, name: str) -> dict[str, float]:
    """Scores on the part of a set that is not in the training rows; none where nothing of it is, or all."""
    from f2llm_ray.evaluate.measure import clean_scores

    overlap, evaluation = graph.overlaps[name], graph.evaluations[model, name]
    facts = run.manifest(overlap)
    if facts is None or not facts["queries"]:
        return {}
    units = run.folder(evaluation).read_table("units.parquet")
    contaminated = run.folder(overlap).read_array(CONTAMINATED)
    return clean_scores((run.manifest(evaluation) or {})["result"]["kind"], units, contaminated)


def _serve_command(root: Folder) -> str:
    return shlex.join(["f2llm", "serve", "--root", root.uri])
