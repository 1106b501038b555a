"""The eight recipes: each stands for the shape, the count and the settings that its comments claim."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from f2llm_ray.engine.encode import encode
from f2llm_ray.model.prune import Kept, prune
from f2llm_ray.model.sizes import (
    FAMILY,
    VOCABULARY,
    Shape,
    count_parameters,
    non_embedding_parameters,
    parameters,
    random_backbone,
)
from f2llm_ray.plan.memory import fits
from f2llm_ray.plan.stage_work import StageWork, shape_of, stage_work, training_stages
from f2llm_ray.recipe.files import load_recipe
from tests.corpus import write_corpus, write_recipe

PRUNED = ("80m", "160m", "330m")
WHOLE = ("0.6b", "1.7b", "4b", "8b", "14b")
TWIN_VOCABULARY = 60
REPO = Path(__file__).parents[2]


def last_work(name: str) -> StageWork:
    """What the recipe's last stage trains."""
    recipe = load_recipe(f"f2llm-v2-{name}")
    return stage_work(recipe, training_stages(recipe)[-1], recipe.compute.workers)


def twin(shape: Shape) -> Shape:
    """The shape at a tenth or so of its widths and depth, with the same groups of heads."""
    return Shape(
        hidden=shape.hidden // 16,
        layers=-(-shape.layers // 10),
        heads=shape.heads // shape.kv_heads * 2,
        kv_heads=2,
        head_dim=8,
        ffn=shape.ffn // 16,
    )


def twin_recipe(name: str, folder: Path) -> Path:
    """The recipe of a size at its twin's shape, for two steps a stage on a made-up corpus, without GPUs."""
    small = write_corpus(folder)
    recipe = load_recipe(f"f2llm-v2-{name}")
    backbone = twin(shape_of(recipe, "untrained")[0])
    engine = {"precision": "fp32", "tokens_per_pass": 1024, "zero_stage": 2}
    if recipe.stages["stage1"].engine.tokens_per_chunk is not None:
        engine["tokens_per_chunk"] = 64
    short = {"max_steps": 2, "global_batch": 16, "warmup_steps": 1, "engine": engine}
    settings: dict[str, Any] = {
        "extends": f"f2llm-v2-{name}",
        "sources": {**dict.fromkeys(recipe.sources), **small["sources"]},
        "data": {"max_tokens": 32, "shards": 2, "language_id": None},
        "tokenizer": {"path": None, "train_vocab": 400},
        "backbone": {"path": None, "shape": backbone.model_dump()},
        "stages": dict.fromkeys(recipe.stages, short),
        "evaluation": small["evaluation"],
        "compute": {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 0.5},
    }
    if recipe.distill is not None:
        target = twin(FAMILY[name])
        settings["prune"] = {part: getattr(target, part) for part in ("layers", "hidden", "ffn")}
        settings["distill"] = short
    return write_recipe(folder, settings)


@pytest.mark.parametrize("name", FAMILY)
def test_the_twin_of_the_recipe_is_a_recipe_with_the_same_keys(name: str, tmp_path: Path) -> None:
    """What the paper asks for stays; the shape of what comes out is the twin's."""
    recipe, whole = load_recipe(str(twin_recipe(name, tmp_path))), load_recipe(f"f2llm-v2-{name}")
    assert recipe.model_fields_set == whole.model_fields_set | {"evaluation"}
    assert recipe.stages.keys() == whole.stages.keys()
    for stage in whole.stages:
        assert recipe.stages[stage].lr == whole.stages[stage].lr
        assert recipe.stages[stage].negatives == whole.stages[stage].negatives
    work = stage_work(recipe, training_stages(recipe)[-1], 2)
    assert work.shape == twin(FAMILY[name])
    assert (work.chunks(work.most_tokens_per_worker) > 1) == (name in {"8b", "14b"})


@pytest.mark.slow  # three stages under Ray Train: two minutes or so
@pytest.mark.timeout(900)
def test_the_twin_of_the_80m_trains_prunes_and_distils(tmp_path: Path) -> None:
    path = twin_recipe("80m", tmp_path)
    job, root = REPO / "jobs" / "pipeline.py", tmp_path / "run"
    command = [sys.executable, str(job), "--recipe", str(path), "--root", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((root / "report.json").read_text())
    counts = {model["name"]: model["non_embedding_parameters"] for model in report["models"]}
    whole, small = (non_embedding_parameters(twin(FAMILY[name])) for name in ("0.6b", "80m"))
    assert counts == {"untrained": whole, "stage1": whole, "stage2": whole, "pruned": small, "distilled": small}


def test_there_is_a_recipe_for_every_size() -> None:
    assert set(PRUNED) | set(WHOLE) == set(FAMILY)


@pytest.mark.parametrize("name", FAMILY)
def test_the_recipe_ends_with_the_published_shape(name: str) -> None:
    work = last_work(name)
    assert load_recipe(f"f2llm-v2-{name}").name == f"f2llm-v2-{name}"
    assert work.shape == FAMILY[name]
    assert work.vocabulary == VOCABULARY
    with torch.device("meta"):
        built = random_backbone(work.shape, work.vocabulary, seed=0)
    assert count_parameters(built)[0] == parameters(FAMILY[name])


@pytest.mark.parametrize("name", FAMILY)
def test_both_stages_have_the_papers_settings(name: str) -> None:
    recipe = load_recipe(f"f2llm-v2-{name}")
    first, second = recipe.stages["stage1"], recipe.stages["stage2"]
    assert (first.instructions, second.instructions) == (False, True)
    assert {recipe.sources[source].task for source in recipe.stage_sources(first)} == {"retrieval"}
    assert set(recipe.stage_sources(second)) == set(recipe.sources)
    for stage in (first, second, *([recipe.distill] if recipe.distill is not None else [])):
        assert (stage.global_batch, stage.epochs, stage.warmup_steps) == (512, 2, 500)
        assert (stage.min_lr, stage.betas, stage.weight_decay, stage.clip) == (1e-7, (0.9, 0.98), 0.01, 1.0)
        assert (stage.temperature, stage.matryoshka_min_dim) == (0.05, 8)
        assert stage.negatives == {"retrieval": 7, "clustering": 9, "classification": 1}
        assert stage.engine.precision == "bf16"
        assert stage.engine.gradient_checkpointing
    assert recipe.data.max_tokens == 1024


def test_the_published_rates_and_the_published_example() -> None:
    assert load_recipe("f2llm-v2-0.6b").stages["stage2"].lr == 1e-5
    example = load_recipe("f2llm-v2-4b")
    assert example.stages["stage2"].lr == 8e-6
    assert example.stages["stage2"].engine.zero_stage == 2
    assert example.compute.workers == 32, "16 rows on each"


@pytest.mark.parametrize("name", PRUNED)
def test_small_models_are_cut_from_the_06b_and_keep_its_attention(name: str) -> None:
    recipe = load_recipe(f"f2llm-v2-{name}")
    parent, _ = shape_of(recipe, "untrained")
    assert parent == FAMILY["0.6b"]
    teacher = last_work(name).teacher
    assert teacher is not None
    assert teacher.shape == parent
    cut = {"hidden": 0, "layers": 0, "ffn": 0}
    assert parent.model_copy(update=cut) == FAMILY[name].model_copy(update=cut)
    assert recipe.distill is not None
    assert recipe.distill.mse_weight == 1.0


@pytest.mark.parametrize("name", FAMILY)
def test_the_recipe_fits_its_own_gpus(name: str) -> None:
    recipe = load_recipe(f"f2llm-v2-{name}")
    for stage in training_stages(recipe):
        assert fits(stage_work(recipe, stage, recipe.compute.workers), 80e9), stage


@pytest.mark.parametrize("name", FAMILY)
def test_a_scaled_down_twin_embeds(name: str) -> None:
    shape = twin(FAMILY[name])
    backbone = random_backbone(shape, TWIN_VOCABULARY, seed=0)
    assert count_parameters(backbone)[0] == parameters(shape, TWIN_VOCABULARY)
    tokens = [np.arange(1, length, dtype=np.uint32) for length in (3, 9, 5)]
    with torch.no_grad():
        vectors = encode(backbone, tokens, pooling="last", tokens_per_pass=64)
    assert vectors.shape == (3, shape.hidden)
    assert torch.isfinite(vectors).all()


@pytest.mark.parametrize("name", PRUNED)
def test_pruning_the_twin_of_the_06b_gives_the_small_twins_count(name: str) -> None:
    shape = twin(FAMILY[name])
    parent = random_backbone(twin(FAMILY["0.6b"]), TWIN_VOCABULARY, seed=0)
    ffn, kv_heads = (
        tuple(tuple(range(count)) for _ in range(shape.layers)) for count in (shape.ffn, shape.kv_heads)
    )
    small = prune(parent, Kept(tuple(range(shape.layers)), tuple(range(shape.hidden)), ffn, kv_heads))
    assert count_parameters(small)[0] == parameters(shape, TWIN_VOCABULARY)
