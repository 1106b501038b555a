"""Variants of a recipe in one root: shared work is done once, a bad one is told before any, the table adds up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.pipeline.ablate import ablate, load_ablation
from f2llm_ray.pipeline.declare import declare
from f2llm_ray.report.ablation import cells, markdown, page, rows_of
from f2llm_ray.run.root import Run
from tests.corpus import write_corpus, write_recipe


def write_variants(folder: Path, **table: Any) -> str:
    path = folder / "variants.yaml"
    path.write_text(yaml.safe_dump(table, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ablation")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> dict[str, Any]:
    return write_corpus(folder)


def test_a_variant_shares_what_it_does_not_change(folder: Path, recipe: dict[str, Any]) -> None:
    path = write_recipe(folder, recipe)
    variants = {
        "whole": None,
        "random": {"prune": {"importance": "random"}},
        "no teacher": {"distill": {"mse_weight": 0}},
        "scratch": {"prune": {"model": "untrained"}},
        "pruned only": {"distill": None},
    }
    ablation = load_ablation(str(path), write_variants(folder, variants=variants), ["distill.max_steps=5"])
    assert ablation.reference == "stage1"
    run = Run(str(folder / "none"))
    graphs = {name: declare(found, run) for name, found in ablation.recipes.items()}
    hashes = {name: {m.name: m.stage.hash for m in graph.models.values()} for name, graph in graphs.items()}
    assert {found["stage1"] for found in hashes.values()} == {hashes["whole"]["stage1"]}
    assert ablation.recipes["random"].distill is not None
    assert ablation.recipes["random"].distill.max_steps == 5
    pruned = {name: found["pruned"] for name, found in hashes.items()}
    assert pruned["whole"] == pruned["no teacher"] == pruned["pruned only"]
    assert len(set(pruned.values())) == 3
    distilled = [found["distilled"] for found in hashes.values() if "distilled" in found]
    assert len(set(distilled)) == len(distilled) == 4


def test_a_bad_variant_is_told_by_name(folder: Path, recipe: dict[str, Any]) -> None:
    path = str(write_recipe(folder, recipe))
    with pytest.raises(RecipeError, match=r"(?s)variants\.yaml: variant 'wide'.*prune\.hiden: unknown key"):
        load_ablation(path, write_variants(folder, variants={"a": {}, "wide": {"prune": {"hiden": 3}}}), [])
    with pytest.raises(RecipeError, match="reference: 'stage9' is not one of"):
        load_ablation(path, write_variants(folder, variants={"a": {}}, reference="stage9"), [])
    (folder / "list.yaml").write_text("[a]")
    with pytest.raises(RecipeError, match="expected a mapping"):
        load_ablation(path, str(folder / "list.yaml"), [])
    with pytest.raises(RecipeError, match="not a table of variants"):
        load_ablation(path, str(folder / "none.yaml"), [])
    (folder / "twice.yaml").write_text("variants:\n  a: {}\n  a: {seed: 2}\n")
    with pytest.raises(RecipeError, match="found the key 'a' twice in one mapping"):
        load_ablation(path, str(folder / "twice.yaml"), [])


def model(name: str, **scores: float) -> dict[str, Any]:
    measured = {found: {"64": {"ndcg@10": value}, "32": {"ndcg@10": value / 2}} for found, value in scores.items()}
    measured["labels"] = {"64": {"accuracy": 1.0}}
    return {"name": name, "parameters": 900, "non_embedding_parameters": 1000, "scores": measured}


def test_the_table_compares_with_the_reference() -> None:
    trained = {"stage1": {"steps": 10, "tokens": 100}, "distilled": {"steps": 5, "tokens": 60}}
    results = {
        "bad": {"error": "a | loss that is no number"},
        "whole": {
            "models": [model("stage1", a=0.4, b=0.8), model("distilled", a=0.2, b=0.7)],
            "training": trained,
            "against_first": {"a": {"low": -0.3, "high": -0.1}, "b": {"low": -0.1, "high": 0.1}},
        },
    }
    told, bad, whole = rows_of(results, "stage1")
    assert (told["name"], told["steps"]) == ("reference: stage1", 10)
    assert told["mean"] == pytest.approx(0.6)
    assert told["kept"] == 1
    assert bad == {"name": "bad", "error": "a | loss that is no number"}
    assert whole["mean"] == pytest.approx(0.45)
    assert whole["kept"] == pytest.approx(0.75)
    assert whole["by_dim"] == pytest.approx({"32": 0.225, "64": 0.45})
    assert (whole["model"], whole["steps"], whole["tokens"]) == ("distilled", 5, 60)
    rows = [told, bad, whole]
    assert len({len(line) for line in cells(rows)}) == 1
    assert "75.0 %" in markdown(rows)
    assert "| 0.200 ▼ | 0.700 | 0.450 |" in markdown(rows)
    assert "a \\| loss" in markdown(rows)
    html = page({"name": "<x>", "created": "now", "device": "cpu", "rows": rows, "changes": {"bad": {"a": 1}}})
    assert "&lt;x&gt;" in html
    assert "<svg" in html
    assert "Best of 1 variant: whole, ndcg@10 0.450, 75.0 % of the reference." in html


@pytest.mark.timeout(300)
def test_variants_run_in_one_root(
    folder: Path, recipe: dict[str, Any], ray_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without training: pruning by three kinds of scores, and int8 weights of one; the second run does nothing."""
    del ray_here
    small = {**recipe, "stages": {}, "prune": {**recipe["prune"], "model": "untrained"}}
    del small["distill"]
    path = str(write_recipe(folder, small))
    table = write_variants(
        folder,
        variants={
            "random": {"prune": {"importance": "random"}},
            "int8": {"quantize": {"models": ["pruned"]}},
        },
    )
    root = folder / "root"
    ablation = load_ablation(path, table, [])
    told = ablate(ablation, str(root))
    first = capsys.readouterr().out
    assert first.count("prepare: started") == 1
    assert first.count("\nuntrained: started") == 1
    assert [row["name"] for row in told["rows"]] == ["reference: untrained", "random", "int8"]
    assert [row["model"] for row in told["rows"]] == ["untrained", "pruned", "pruned-int8"]
    _, first, second = told["rows"]
    assert first["against_first"] == {}
    gaps = {name: gap["difference"] for name, gap in second["against_first"].items()}
    assert gaps == pytest.approx({name: second["scores"][name] - first["scores"][name] for name in gaps}, abs=2e-6)
    assert set(gaps) == set(first["scores"])
    assert json.loads((root / "ablation.json").read_text())["rows"] == told["rows"]
    assert (root / "ablation.md").read_text().count("\n") == 5
    assert "<svg" in (root / "ablation.html").read_text()
    manifest = json.loads(next(root.glob("pruned-int8-*/manifest.json")).read_text())
    facts = manifest["quantization"]
    assert facts["cosine"]["mean"] > 0.99
    assert facts["bytes_of_weights"]["int8"] < 0.4 * facts["bytes_of_weights"]["float"]
    assert manifest["non_embedding_parameters"] == told["rows"][1]["non_embedding_parameters"]
    again = ablate(ablation, str(root))
    assert again["rows"] == told["rows"]
    second = capsys.readouterr().out
    assert "prepare: finished before, skipped" in second
    assert "prepare: started" not in second
    late = ablate(ablation, str(root), hours=0.0)
    assert [row.get("error") for row in late["rows"]] == ["not begun: 0 h were over"] * 2
