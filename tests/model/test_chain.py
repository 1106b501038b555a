"""Recipes that prune a backbone as it is, chains of them, and scores that are shared between shapes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from f2llm_ray.pipeline.stages import Plan, plan

from f2llm_ray.base.errors import RecipeError, RunError
from f2llm_ray.model.checkpoint import load_info
from f2llm_ray.model.int8 import save_quantized
from f2llm_ray.pipeline.work import make_untrained
from f2llm_ray.recipe.files import load_recipe
from f2llm_ray.run.folder import Folder
from tests.corpus import write_corpus, write_recipe
from tests.tiny import tiny_model


def recipe(folder: Path, **prune: Any) -> Path:
    content = write_corpus(folder)
    content["stages"] = {}
    content["prune"] = {"model": "untrained", **prune}
    content["distill"]["teacher"] = "untrained"
    return write_recipe(folder, content)


def planned(path: Path, *overrides: str) -> Plan:
    return plan(load_recipe(str(path), list(overrides)))


def test_a_recipe_without_contrastive_stages_prunes_and_distils_its_backbone(tmp_path: Path) -> None:
    found = planned(recipe(tmp_path, layers=1))
    assert list(found.models) == ["untrained", "pruned", "distilled"]
    untrained = found.models["untrained"]
    assert found.importance is not None
    assert untrained in found.importance.parents
    assert found.models["pruned"].parents[1:] == (untrained, found.importance)


def test_another_shape_of_the_same_parent_shares_its_scores(tmp_path: Path) -> None:
    path = recipe(tmp_path, layers=1)
    one, other = planned(path), planned(path, "prune.layers=2", "prune.ffn=32", "name=other")
    assert one.importance is not None
    assert other.importance is not None
    assert one.importance.hash == other.importance.hash
    assert one.models["pruned"].hash != other.models["pruned"].hash
    for change in ("prune.importance=random", "prune.calibration_rows=7", "backbone.shape.ffn=80"):
        changed = planned(path, change)
        assert changed.importance is not None
        assert changed.importance.hash != one.importance.hash


def test_a_chain_starts_from_the_last_recipes_model(tmp_path: Path) -> None:
    path = recipe(tmp_path, layers=1)
    first = planned(path)
    folder = tmp_path / "run" / first.models["distilled"].folder_name / "model"
    again = planned(path, f"backbone={{path: {folder}}}", "tokenizer={}")
    assert list(again.models) == ["untrained", "pruned", "distilled"]
    assert again.models["pruned"].hash != first.models["pruned"].hash


def test_a_chain_keeps_the_facts_of_the_model_and_refuses_int8_weights(tmp_path: Path) -> None:
    """Int8 weights would be taken for float ones, and nothing would say so."""
    folder, prepared, out = tiny_model(tmp_path / "model"), tmp_path / "prepared", Folder.at(str(tmp_path / "out"))
    shutil.copytree(folder, prepared / "tokenizer")
    found = load_recipe(str(recipe(tmp_path, layers=1)), [f"backbone={{path: {folder}}}", "tokenizer={}"])
    make_untrained(found, str(folder), Folder.at(str(prepared)), out)
    before, after = load_info(folder), load_info(tmp_path / "out" / "model")
    assert (after.dims, after.prompts, after.name) == (before.dims, before.prompts, f"{found.name}-untrained")
    save_quantized(folder, tmp_path / "int8")
    with pytest.raises(RunError, match=r"backbone\.path: .*int8 has int8 weights, which cannot be trained"):
        make_untrained(found, str(tmp_path / "int8"), Folder.at(str(prepared)), out)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("prune={model: pruned, layers: 1}", ["prune.model: 'pruned'", "untrained"]),
        ("prune={model: untrained}", ["prune", "set at least one of layers, hidden, ffn, kv_heads, vocabulary"]),
        ("prune={model: untrained, kv_heads: 3}", ["prune.kv_heads: 3 is more than the backbone's 2"]),
        ("prune={model: untrained, vocabulary: some}", ["prune.vocabulary", "used", "some"]),
    ],
)
def test_what_cannot_be_pruned_is_refused(tmp_path: Path, override: str, words: list[str]) -> None:
    path = recipe(tmp_path, layers=1)
    with pytest.raises(RecipeError) as refused:
        load_recipe(str(path), [override])
    assert all(word in str(refused.value) for word in words), str(refused.value)
