"""What is left when a stage is done: the model folder and `training.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from f2llm_ray.data.schema import query_text
from f2llm_ray.model.checkpoint import ModelInfo, matryoshka_dims, save_model
from f2llm_ray.model.vocabulary import TokenMap, save_map
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.settings import TrainStage

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel


def export(
    engine: DeepSpeedEngine,
    out: Folder,
    *,
    tokenizer: Tokenizer,
    info: ModelInfo,
    token_map: TokenMap | None,
    training: dict[str, Any],
    rank: int,
) -> None:
    """Writes the engine's model and the facts of its training, on the first rank; every rank must call it.

    A model whose vocabulary was cut keeps its map of the prepared tokens, by which later stages read them.
    """
    state = gathered(engine, engine.module.backbone)
    if rank != 0:
        return
    with (out / "model").writing() as folder:
        save_model(folder, engine.module.backbone, tokenizer, info, state=state)
        if token_map is not None:
            save_map(token_map, folder)
    out.write_json("training.json", training)


def trained_info(
    before: ModelInfo, recipe: Recipe, name: str, stage: TrainStage, sources: Sequence[str], hidden: int
) -> ModelInfo:
    """The facts of the model that a stage makes from the one `before`."""
    prompts = {
        source: query_text("", recipe.sources[source].query_instruction) if stage.instructions else ""
        for source in sources
    }
    return replace(
        before,
        name=f"{recipe.name}-{name}",
        dims=matryoshka_dims(hidden, stage.matryoshka_min_dim),
        prompts={"query": prompts[sources[0]], **prompts},
        instructions=stage.instructions,
    )


def gathered(engine: DeepSpeedEngine, backbone: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The backbone's whole state in float32 on the CPU, also when ZeRO-3 keeps it in parts."""
    import deepspeed

    sharded = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(list(backbone.parameters()), enabled=sharded):
        return {name: value.detach().float().cpu().clone() for name, value in backbone.state_dict().items()}
