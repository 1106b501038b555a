"""Shapes: the eight of the family (paper), those of checkpoints, and a random model of any Qwen3 shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, model_validator

from f2llm_ray.base.errors import RecipeError, RunError
from f2llm_ray.base.section import Output, Section
from f2llm_ray.model.families import FAMILIES, Axis, Family, axes_of, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Shape(Section):
    """A Qwen3 decoder's shape (paper.md names the eight of the family; vocabulary comes with the tokenizer)."""

    hidden: Output[int] = Field(ge=8)
    """Channels of the residual stream, which is the size of the vectors."""
    layers: Output[int] = Field(ge=1)
    """Decoder layers."""
    heads: Output[int] = Field(ge=1)
    """Query heads of each layer."""
    kv_heads: Output[int] = Field(ge=1)
    """Key-value heads of each layer; as many query heads share each of them."""
    head_dim: Output[int] = Field(default=128, ge=8)
    """Channels of each head."""
    ffn: Output[int] = Field(ge=8)
    """Channels of each layer's FFN."""
    max_positions: Output[int] = Field(default=40_960, ge=8)
    """Tokens of the longest text that the model could take."""
    rope_theta: Output[float] = Field(default=1_000_000.0, gt=0)
    """Base of the wavelengths of rotary position embeddings (RoFormer, arXiv 2104.09864)."""

    @model_validator(mode="after")
    def _groups(self) -> Shape:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self


class Architecture(Shape):
    """The shape of a checkpoint of another family than Qwen3."""

    kind: Output[str]
    """Its `model_type`."""
    causal: Output[bool]
    types: Output[int] = 0
    """Entries of BERT's table of segments."""


VOCABULARY = 151_936
"""Entries of Qwen3's input embeddings."""

QWEN3 = "qwen3"
OWN_HEAD_DIM = (QWEN3, "gemma3_text")
"""Families whose heads are not hidden_size / num_attention_heads wide where a config does not say it."""

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
    """Shape and vocabulary of a checkpoint: a hub name among `BACKBONES`, or a local folder.

    Raises:
        RecipeError: another hub name, or a folder of a family that is not known here.
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
        family, kind = family_of(config, str(path)), config["model_type"]
        if family.causal and config.get("attention_bias"):
            raise RecipeError(f"{path}: {kind} with attention_bias; only parameters without are counted")
        heads = config["num_attention_heads"]
        sizes = {
            "hidden": config["hidden_size"],
            "layers": config["num_hidden_layers"],
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config["head_dim"]
            if kind in OWN_HEAD_DIM
            else config.get("head_dim") or config["hidden_size"] // heads,
            "ffn": config["intermediate_size"],
            "max_positions": config["max_position_embeddings"],
        }
        types = config.get("type_vocab_size", 0)
        shape = (
            Shape(**sizes)
            if kind == QWEN3
            else Architecture(**sizes, kind=kind, causal=family.causal, types=types)
        )
        return shape, int(config["vocab_size"])
    except KeyError as error:
        raise RecipeError(f"{path}: it has no {error}") from None
    except RunError as error:
        raise RecipeError(str(error)) from None
    except (ValueError, TypeError, ValidationError) as error:
        raise RecipeError(f"{path}: not a model's config: {error}") from None


def kind_of(shape: Shape) -> str:
    """The `model_type` of a shape."""
    return shape.kind if isinstance(shape, Architecture) else QWEN3


def is_causal(shape: Shape) -> bool:
    """Whether a token sees only those before it."""
    return shape.causal if isinstance(shape, Architecture) else True


def non_embedding_parameters(shape: Shape) -> int:
    """Parameters outside the embeddings."""
    return _parameters(shape, 0)[1]


def parameters(shape: Shape, vocabulary: int = VOCABULARY) -> int:
    """All parameters, the language-model head left out."""
    return _parameters(shape, vocabulary)[0]


def family_of_shape(shape: Shape) -> Family:
    """The family of a shape."""
    return FAMILIES[kind_of(shape)]


def _parameters(shape: Shape, vocabulary: int) -> tuple[int, int]:
    return family_of_shape(shape).parameters(shape_axes(shape, vocabulary), shape.layers)


def shape_axes(shape: Shape, vocabulary: int = VOCABULARY) -> dict[Axis, int]:
    """How long each axis of a model of this shape is."""
    return axes_of(
        vocabulary=vocabulary,
        positions=shape.max_positions,
        types=shape.types if isinstance(shape, Architecture) else 0,
        hidden=shape.hidden,
        ffn=shape.ffn,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
    )


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
