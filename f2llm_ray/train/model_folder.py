"""Model folders: the one that a finished training leaves, and copies of it with other weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from f2llm_ray.data.schema import query_text
from f2llm_ray.data.tokens.tokenizer import load_tokenizer
from f2llm_ray.model.checkpoint import ModelInfo, load_backbone, matryoshka_dims, save_model
from f2llm_ray.model.dense import end_in
from f2llm_ray.model.vocabulary import TokenMap, load_map, save_map
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.deepspeed import read_state, trained
from f2llm_ray.train.lora import ADAPTER, changed, write_adapter
from f2llm_ray.train.settings import Lora
from f2llm_ray.train.training import Training

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine
    from tokenizers import Tokenizer


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
    state = gathered(engine)
    if rank != 0:
        return
    with (out / "model").writing() as folder:
        save_model(folder, engine.module.backbone, tokenizer, info, state=state)
        if token_map is not None:
            save_map(token_map, folder)
    out.write_json("training.json", training)


def export_adapted(
    engine: DeepSpeedEngine,
    out: Folder,
    *,
    student: Path,
    lora: Lora,
    info: ModelInfo,
    ends: tuple[int, ...] | None,
    training: dict[str, Any],
    rank: int,
) -> None:
    """Writes what `export` does, after LoRA: the model that training began from, with the changes added.

    Beside it are the changes themselves, as PEFT has them. Every rank must call it.
    """
    found = gathered_trained(engine)
    if rank != 0:
        return
    with (out / "model").writing() as folder:
        write_reweighted(student, folder, info, lambda name, left: changed(name, left, lora, found.get), ends=ends)
    with (out / ADAPTER).writing() as folder:
        write_adapter(folder, lora, found)
    out.write_json("training.json", training)


def write_reweighted(
    model: Path,
    folder: Path,
    info: ModelInfo,
    weight: Callable[[str, torch.Tensor], torch.Tensor],
    *,
    ends: tuple[int, ...] | None = None,
) -> None:
    """Writes a copy of a model folder with other weights.

    Args:
        model: the model folder that is copied.
        folder: gets the copy.
        info: the copy's facts.
        weight: returns the copy's weight for the name and the value of the model's.
        ends: the dims of the copy's vectors, where training gave it a map to them that the model may not have.
    """
    backbone = load_backbone(model)
    if ends is not None:
        end_in(backbone, ends[-1], str(model))
    state = {name: weight(name, value) for name, value in backbone.state_dict().items()}
    save_model(folder, backbone, load_tokenizer(model), info, state=state)
    token_map = load_map(Folder.at(str(model)))
    if token_map is not None:
        save_map(token_map, folder)


def trained_info(before: ModelInfo, training: Training) -> ModelInfo:
    """The facts of the model that a training makes from the one with the facts `before`."""
    settings = training.settings
    prompts = {
        name: query_text("", source.instruction) if settings.instructions else training.prompts.query
        for name, source in training.sources.items()
    }
    return replace(
        before,
        name=training.model_name,
        dims=training.ends or matryoshka_dims(before.dims[-1], settings.matryoshka_min_dim),
        space=training.space,
        prompts={
            "query": next(iter(prompts.values())),
            **prompts,
            "document": training.prompts.document,
        },
        instructions=settings.instructions,
        exits=settings.exits,
    )


def gathered(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The backbone's whole state in float32 on the CPU, also when ZeRO-3 keeps it in parts."""
    import deepspeed

    backbone, sharded = engine.module.backbone, engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(list(backbone.parameters()), enabled=sharded):
        return {name: value.detach().float().cpu().clone() for name, value in backbone.state_dict().items()}


def gathered_trained(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The trained parameters of the backbone in float32 on the CPU, by name; every rank must call it."""
    backbone = engine.module.backbone
    return {
        name: read_state(engine, value, "weight").detach().float().cpu().clone()
        for name, value in trained(backbone)
    }
