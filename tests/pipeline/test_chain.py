"""Recipes that prune a backbone as it is, chains of them, and scores that are shared between shapes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from f2llm_ray.base.errors import RecipeError, RunError
from f2llm_ray.data.schema import TextPrompts
from f2llm_ray.data.tokens.build import write_prompts
from f2llm_ray.model.checkpoint import load_info
from f2llm_ray.model.settings import Backbone
from f2llm_ray.pipeline.declare import declare
from f2llm_ray.pipeline.graph import Graph
from f2llm_ray.pipeline.work import make_untrained
from f2llm_ray.recipe.files import load_recipe
from f2llm_ray.run.folder import Folder
from f2llm_ray.run.root import Run
from f2llm_ray.shrink.quantize import save_quantized
from tests.corpus import write_corpus, write_recipe
from tests.tiny import tiny_model


def recipe(folder: Path, **prune: Any) -> Path:
    content = write_corpus(folder)
    content["stages"] = {}
    content["prune"] = {"model": "untrained", **prune}
    content["distill"]["teacher"] = "untrained"
    return write_recipe(folder, content)


def declared(path: Path, *overrides: str) -> Graph:
    return declare(load_recipe(str(path), list(overrides)), Run(str(path.parent / "root")))


def hashes(graph: Graph) -> dict[str, str]:
    return {stage.name: stage.hash for stage in graph.stages()}


def test_a_recipe_without_contrastive_stages_prunes_and_distils_its_backbone(tmp_path: Path) -> None:
    found = declared(recipe(tmp_path, layers=1))
    assert list(found.models) == ["untrained", "pruned", "distilled"]
    untrained, pruned = found.models["untrained"].stage, found.models["pruned"].stage
    (scores,) = (stage for stage in found.stages() if stage.name == "importance-untrained")
    assert untrained in scores.parents.values()
    assert {untrained, scores} <= set(pruned.parents.values())


def test_another_shape_of_the_same_parent_shares_its_scores(tmp_path: Path) -> None:
    path = recipe(tmp_path, layers=1)
    one, other = hashes(declared(path)), hashes(declared(path, "prune.layers=2", "prune.ffn=32", "name=other"))
    assert one["importance-untrained"] == other["importance-untrained"]
    assert one["pruned"] != other["pruned"]
    for change in ("prune.importance=random", "prune.calibration_rows=7", "backbone.shape.ffn=80"):
        assert hashes(declared(path, change))["importance-untrained"] != one["importance-untrained"]


def test_a_chain_starts_from_the_last_recipes_model(tmp_path: Path) -> None:
    path, folder = recipe(tmp_path, layers=1), tiny_model(tmp_path / "distilled")
    again = declared(path, f"backbone={{path: {folder}}}", "tokenizer={}")
    assert list(again.models) == ["untrained", "pruned", "distilled"]
    assert hashes(again)["pruned"] != hashes(declared(path))["pruned"]


def test_a_chain_keeps_the_facts_of_the_model_and_refuses_int8_weights(tmp_path: Path) -> None:
    """Int8 weights would be taken for float ones, and nothing would say so."""
    folder, prepared = tiny_model(tmp_path / "model"), tmp_path / "prepared"
    shutil.copytree(folder, prepared / "tokenizer")
    write_prompts(Folder.at(str(prepared)), TextPrompts())
    places: Any = {"prepared": Folder.at(str(prepared)), "out": Folder.at(str(tmp_path / "out"))}
    make_untrained(Backbone(path=str(folder)), 0, model_name="again", max_tokens=64, **places)
    before, after = load_info(folder), load_info(tmp_path / "out" / "model")
    assert (after.dims, after.prompts, after.name) == (before.dims, before.prompts, "again")
    save_quantized(folder, tmp_path / "int8")
    with pytest.raises(RunError, match=r"backbone\.path: .*int8 has int8 weights, which cannot be trained"):
        make_untrained(Backbone(path=str(tmp_path / "int8")), 0, model_name="a", max_tokens=64, **places)


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
