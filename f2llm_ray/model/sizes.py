"""Shapes: the eight of the family (paper), and a random model of any Qwen3 shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from f2llm_ray.section import Section

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Shape(Section):
    """A Qwen3 decoder's shape (paper.md names the eight of the family; vocabulary comes with the tokenizer)."""

    hidden: int = Field(ge=8)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(default=128, ge=8)
    ffn: int = Field(ge=8)
    max_positions: int = Field(default=40_960, ge=8)
    rope_theta: float = Field(default=1_000_000.0, gt=0)

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


def non_embedding_parameters(shape: Shape) -> int:
    """Parameters of the layers and the final norm."""
    attention = shape.hidden * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    norms = 2 * shape.hidden + 2 * shape.head_dim
    return shape.layers * (attention + 3 * shape.hidden * shape.ffn + norms) + shape.hidden


def parameters(shape: Shape, vocabulary: int = VOCABULARY) -> int:
    """All parameters, the language-model head left out."""
    return vocabulary * shape.hidden + non_embedding_parameters(shape)


def count_parameters(backbone: PreTrainedModel) -> tuple[int, int]:
    """All parameters of a model, and those outside its input embeddings."""
    total = sum(parameter.numel() for parameter in backbone.parameters())
    return total, total - backbone.get_input_embeddings().weight.numel()


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
