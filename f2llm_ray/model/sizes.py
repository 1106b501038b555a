"""Shapes: the eight of the family (paper), and a random model of any Qwen3 shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, model_validator

from f2llm_ray.base.errors import RecipeError
from f2llm_ray.base.section import Output, Section

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Shape(Section):
    """A Qwen3 decoder's shape (paper.md names the eight of the family; vocabulary comes with the tokenizer)."""

    hidden: Output[int] = Field(ge=8)
    layers: Output[int] = Field(ge=1)
    heads: Output[int] = Field(ge=1)
    kv_heads: Output[int] = Field(ge=1)
    head_dim: Output[int] = Field(default=128, ge=8)
    ffn: Output[int] = Field(ge=8)
    max_positions: Output[int] = Field(default=40_960, ge=8)
    rope_theta: Output[float] = Field(default=1_000_000.0, gt=0)

    @model_validator(mode="after")
    def _groups(self) -> Shape:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self


VOCABULARY = 151_936
"""Entries of Qwen3's input embeddings."""

FAMILY: dict[str, Shape] = {
    "80m": Shape(hidden=320, layers=8, heads=16, kv_heads=8, ffn=2048),
    "160m": Shape(hidden=640, layers=9, heads=16, kv_heads=8, ffn=1536),
    "330m": Shape(hidden=896, layers=16, heads=16, kv_heads=8, ffn=2560),
    "0.6b": Shape(hidden=1024, layers=28, heads=16, kv_heads=8, ffn=3072),
    "1.7b": Shape(hidden=2048, layers=28, heads=16, kv_heads=8, ffn=6144),
    "4b": Shape(hidden=2560, layers=36, heads=32, kv_heads=8, ffn=9728),
    "8b": Shape(hidden=4096, layers=36, heads=32, kv_heads=8, ffn=12_288),
    "14b": Shape(hidden=5120, layers=40, heads=40, kv_heads=8, ffn=17_408),
}

BACKBONES = {f"Qwen/Qwen3-{name.upper()}": name for name in ("0.6b", "1.7b", "4b", "8b", "14b")}
"""Hub names of the checkpoints that the family starts from; with -Base at the end they have the same shapes."""


def checkpoint_shape(path: str) -> tuple[Shape, int]:
    """Shape and vocabulary of a Qwen3 checkpoint: a hub name among `BACKBONES`, or a local folder.

    Raises:
        RecipeError: another hub name, or a folder of another architecture.
    """
    config = Path(path) / "config.json"
    if config.is_file():
        return _shape_of(config)
    name = BACKBONES.get(path.removesuffix("-Base"))
    if name is None:
        raise RecipeError(
            f"{path!r}: the shape of this model is not known here; expected a folder with a config.json, "
            f"or one of {list(BACKBONES)}"
        )
    return FAMILY[name], VOCABULARY


def _shape_of(path: Path) -> tuple[Shape, int]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if config["model_type"] != "qwen3" or config.get("attention_bias"):
            raise RecipeError(
                f"{path}: model_type {config['model_type']!r} with attention_bias "
                f"{config.get('attention_bias', False)}; only the parameters of qwen3 without are counted"
            )
        names = {
            "hidden": "hidden_size",
            "layers": "num_hidden_layers",
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
            "ffn": "intermediate_size",
            "max_positions": "max_position_embeddings",
        }
        return Shape(**{ours: config[theirs] for ours, theirs in names.items()}), int(config["vocab_size"])
    except KeyError as error:
        raise RecipeError(f"{path}: it has no {error}") from None
    except (ValueError, TypeError, ValidationError) as error:
        raise RecipeError(f"{path}: not a model's config: {error}") from None


def non_embedding_parameters(shape: Shape) -> int:
    """Parameters of the layers and the final norm."""
    attention = shape.hidden * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    norms = 2 * shape.hidden + 2 * shape.head_dim
    return shape.layers * (attention + 3 * shape.hidden * shape.ffn + norms) + shape.hidden


def parameters(shape: Shape, vocabulary: int = VOCABULARY) -> int:
    """All parameters, the language-model head left out."""
    return vocabulary * shape.hidden + non_embedding_parameters(shape)


def count_parameters(backbone: PreTrainedModel) -> tuple[int, int]:
    """All parameters of a model, and those outside its embeddings (of tokens, and of positions if it has them)."""
    import torch

    total = sum(parameter.numel() for parameter in backbone.parameters())
    tables = {module for module in backbone.modules() if isinstance(module, torch.nn.Embedding)}
    tables.add(backbone.get_input_embeddings())  # the int8 one is of another class
    return total, total - sum(table.weight.numel() for table in tables)


def random_backbone(shape: Shape, vocabulary: int, seed: int) -> PreTrainedModel:
    """A Qwen3 decoder of this shape with random float32 weights, the same for the same seed."""
    import torch
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.ffn,
        max_position_embeddings=shape.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3Model(config).float()
