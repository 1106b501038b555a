"""The prune stage: calibration text from the corpus, importance, and the smaller model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from f2llm_ray.data.schema import key_numbers, rng
from f2llm_ray.data.tokens import TokenStore
from f2llm_ray.model.checkpoint import load_backbone, load_info, load_tokenizer, matryoshka_dims, save_model
from f2llm_ray.model.encoder import Tokens
from f2llm_ray.model.importance import measure
from f2llm_ray.model.prune import choose, prune
from f2llm_ray.progress import say
from f2llm_ray.recipe import Recipe
from f2llm_ray.run import Folder


def shrink(recipe: Recipe, prepared: Folder, parent: Folder, out: Folder) -> dict[str, Any]:
    """Prunes the parent model to the recipe's `prune` shape.

    Args:
        recipe: the run's recipe, with `prune`.
        prepared: folder of the prepare stage, for calibration text.
        parent: model folder to prune.
        out: the stage's folder; it gets `model/`.

    Returns:
        What the manifest says: the kept layers and the importance of each layer.
    """
    settings = recipe.prune
    assert settings is not None  # noqa: S101 - the stage exists because the recipe has it
    calibration = calibration_tokens(recipe, prepared, settings.calibration_rows)
    say(f"pruned: importance from {len(calibration):,} texts")
    with parent.as_local() as folder:
        info, tokenizer, backbone = load_info(folder), load_tokenizer(folder), load_backbone(folder).eval()
    importance = measure(backbone, calibration, tokens_per_pass=16_384)
    kept = choose(importance, layers=settings.layers, hidden=settings.hidden, ffn=settings.ffn)
    small = prune(backbone, kept)
    named = replace(info, name=f"{recipe.name}-pruned", dims=matryoshka_dims(settings.hidden, info.dims[0]))
    with (out / "model").writing() as path:
        save_model(path, small, tokenizer, named)
    return {
        "kept_layers": list(kept.layers),
        "layer_importance": [round(score, 6) for score in importance.layers_l.tolist()],
    }


def calibration_tokens(recipe: Recipe, prepared: Folder, rows: int) -> list[Tokens]:
    """Token lists of queries (with instructions) and passages of training rows, as many from each source."""
    share = -(-rows // len(recipe.sources))
    keys = []
    for source in recipe.sources:
        table = (prepared / "table").read_table(f"{source}.parquet", ["instructed_key", "passage_key"])
        drawn = rng(recipe.seed, "calibration", source).permutation(len(table))[:share]
        keys += [key_numbers(table[column].take(drawn)) for column in table.column_names]
    with (prepared / "tokens").as_local() as store:
        # Copied, since the store may be a temporary copy of a remote one.
        return [text.copy() for text in TokenStore(store).lookup(np.concatenate(keys))]
