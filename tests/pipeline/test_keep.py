"""`backbone.keep`: the backbone is pruned before any training, by the same code as a step that prunes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from f2llm_ray.base.errors import RecipeError, RunError
from f2llm_ray.pipeline.declare import declare
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.plan.stage_work import shape_of, stage_work
from f2llm_ray.recipe.files import load_recipe, parse
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.root import Run
from tests.corpus import write_corpus
from tests.encoders import encoder_folder

CUT = {"layers": 1, "hidden": 24, "ffn": 32, "calibration_rows": 30}


def recipe_of(folder: Path, keep: dict[str, Any], **more: Any) -> Recipe:
    given = write_corpus(folder, rows=120)
    for name in ("labels", "clusters"):
        del given["sources"][name]
    del given["prune"], given["distill"]
    given["backbone"]["keep"] = keep
    given["stages"] |= more
    return parse(Recipe, given, "r")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    """Pruned by `keep` and by a step with the same numbers; and the whole one, kept."""
    del ray_here
    folder = tmp_path_factory.mktemp("keep")
    recipe = recipe_of(folder, CUT, same={"kind": "prune", "model": "untrained", **CUT})
    pipeline = Pipeline(recipe, str(folder / "root"))
    pipeline.job("prepare")
    pipeline.job("train", "untrained")
    for name in ("kept", "same"):
        pipeline.model(name)
    return folder / "root"


def weights(root: Path, model: str) -> dict[str, torch.Tensor]:
    (found,) = root.glob(f"{model}-[0-9a-f]*")
    return load_file(found / "model" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_keeping_is_pruning_the_untrained_model(root: Path) -> None:
    kept, whole = weights(root, "kept"), weights(root, "untrained")
    assert same(kept, weights(root, "same"))
    assert kept["embed_tokens.weight"].shape[1] == CUT["hidden"] < whole["embed_tokens.weight"].shape[1]


def test_keeping_everything_changes_no_bit(root: Path, tmp_path: Path) -> None:
    assert root.exists(), "Ray runs as long as this fixture does"
    recipe = recipe_of(tmp_path, {"layers": 2, "hidden": 32, "ffn": 64, "kv_heads": 2, "calibration_rows": 30})
    pipeline = Pipeline(recipe, str(tmp_path / "root"))
    pipeline.job("prepare")
    pipeline.model("kept")
    assert same(weights(tmp_path / "root", "kept"), weights(tmp_path / "root", "untrained"))


def test_both_are_measured_and_training_goes_on_from_what_is_kept(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, CUT)
    graph = declare(recipe, Run(str(tmp_path / "root")))
    assert list(graph.models) == ["untrained", "kept", "stage1"]
    assert graph.models["stage1"].stage.parents["student"] is graph.models["kept"].stage
    assert {model for model, _ in graph.evaluations} >= {"untrained", "kept", "stage1"}
    assert recipe.reference() == "untrained"
    whole = recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update={"keep": None})})
    other = declare(whole, Run(str(tmp_path / "root")))
    assert other.models["untrained"].stage.hash == graph.models["untrained"].stage.hash
    assert other.models["stage1"].stage.hash != graph.models["stage1"].stage.hash


def test_the_plan_counts_what_is_kept() -> None:
    recipe = load_recipe("f2llm-v2-0.6b", ["backbone.keep={layers: 6, ffn: 1024, vocabulary: 50000}"])
    (shape, vocabulary), (whole, _) = shape_of(recipe, "kept"), shape_of(recipe, "untrained")
    assert (shape, vocabulary) == (whole.model_copy(update={"layers": 6, "ffn": 1024}), 50_000)
    assert stage_work(recipe, "stage1", 8).shape == shape


def test_what_cannot_be_kept_is_refused_where_the_recipe_says_it(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"backbone\.keep\.layers: 3 is more than the backbone's 2"):
        recipe_of(tmp_path, {"layers": 3})
    with pytest.raises(RecipeError, match=r"backbone\.keep: .*set at least one of layers"):
        recipe_of(tmp_path, {})
    with pytest.raises(RecipeError, match=r"stages\.kept: this name is taken"):
        recipe_of(tmp_path, CUT, kept={})
    recipe = recipe_of(tmp_path, {"hidden": 16})
    backbone = recipe.backbone.model_copy(
        update={"shape": None, "path": str(encoder_folder(tmp_path / "backbone", "xlm-roberta", layers=3))}
    )
    pipeline = Pipeline(recipe.model_copy(update={"backbone": backbone}), str(tmp_path / "root"))
    with pytest.raises(RunError, match=r"backbone\.keep\.hidden: .* cannot lose any: its LayerNorms"):
        pipeline.stage(pipeline.graph.prepare)
