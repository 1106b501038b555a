"""Families of decoders that can be cut: what the axes of each weight are, and how its size follows the width.

Cutting the hidden size from d to d' must not move what the parts that stay compute. An RMSNorm divides by the
root mean square over all channels; over the d' that stay, the mean of their squares is d / d' times that of the
parent with zeros in place of the others. With c = sqrt(d' / d), all that is written to the residual stream is
multiplied by c, so that its mean square (and the weight of the norm's eps beside it) is the parent's, and the
norms that read it are divided by c. `Weight.power` says which power of c a weight takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from f2llm_ray.base.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Axis = Literal["vocabulary", "hidden", "ffn", "heads", "kv_heads", "head_dim"]
"""What one dimension of a weight runs over; "heads" and "kv_heads" are heads times head_dim."""


@dataclass(frozen=True)
class Weight:
    """One weight of a decoder; linear ones are [out, in]."""

    axes: tuple[Axis, ...]
    power: int = 0
    """Of c: 1 where it writes to the residual stream, -1 where it is the norm that reads it."""


@dataclass(frozen=True)
class DecoderFamily:
    """A kind of decoder, as Hugging Face names it and its weights."""

    layer: dict[str, Weight]
    """The weights of each layer, by their names in it."""
    ends: dict[str, Weight]
    """Those outside the layers."""
    norm_adds_one: bool = False
    """Norms multiply by 1 + weight."""

    def weight(self, name: str) -> Weight:
        """The weight of a name in the state dict.

        Raises:
            RunError: the family has none of this name.
        """
        found = self.ends.get(name) or self.layer.get(name.split(".", 2)[-1])
        if found is None:
            raise RunError(f"weight {name!r} is not one of {[*self.ends, *self.layer]}: it cannot be pruned")
        return found

    @property
    def readers(self) -> list[str]:
        """Names, in a layer, of the norms that read the residual stream."""
        return [name.removesuffix(".weight") for name, weight in self.layer.items() if weight.power == -1]


_ATTENTION = {
    "self_attn.q_proj.weight": Weight(("heads", "hidden")),
    "self_attn.k_proj.weight": Weight(("kv_heads", "hidden")),
    "self_attn.v_proj.weight": Weight(("kv_heads", "hidden")),
    "self_attn.o_proj.weight": Weight(("hidden", "heads"), 1),
}
_HEAD_NORMS = {
    "self_attn.q_norm.weight": Weight(("head_dim",)),
    "self_attn.k_norm.weight": Weight(("head_dim",)),
}
_FFN = {
    "mlp.gate_proj.weight": Weight(("ffn", "hidden")),
    "mlp.up_proj.weight": Weight(("ffn", "hidden")),
    "mlp.down_proj.weight": Weight(("hidden", "ffn"), 1),
}
_NORMS = {
    "input_layernorm.weight": Weight(("hidden",), -1),
    "post_attention_layernorm.weight": Weight(("hidden",), -1),
}
_ENDS = {"embed_tokens.weight": Weight(("vocabulary", "hidden"), 1), "norm.weight": Weight(("hidden",), -1)}

FAMILIES = {
    "qwen3": DecoderFamily({**_ATTENTION, **_HEAD_NORMS, **_FFN, **_NORMS}, _ENDS),
    "llama": DecoderFamily({**_ATTENTION, **_FFN, **_NORMS}, _ENDS),
    "gemma3_text": DecoderFamily(
        {
            **_ATTENTION,
            **_HEAD_NORMS,
            **_FFN,
            "input_layernorm.weight": Weight(("hidden",), -1),
            "pre_feedforward_layernorm.weight": Weight(("hidden",), -1),
            # These norm what attention and FFN give before it is added: dividing by its own mean square, which the
            # cut makes larger, is what multiplies it by c.
            "post_attention_layernorm.weight": Weight(("hidden",)),
            "post_feedforward_layernorm.weight": Weight(("hidden",)),
        },
        # Embeddings are multiplied by sqrt(hidden size) when they are looked up, which brings their c.
        {"embed_tokens.weight": Weight(("vocabulary", "hidden")), "norm.weight": Weight(("hidden",), -1)},
        norm_adds_one=True,
    ),
}


def family_of(config: PreTrainedConfig) -> DecoderFamily:
    """The family of a model's config.

    Raises:
        RunError: it is none of `FAMILIES`, or has what they do not: biases, or attention to later tokens.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise RunError(
            f"model_type {config.model_type!r} cannot be pruned; the families that can are {sorted(FAMILIES)}"
        )
    for flag in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if getattr(config, flag, None):
            raise RunError(f"model_type {config.model_type!r} with {flag} cannot be pruned; expected without")
    return family


def axis_sizes(config: PreTrainedConfig) -> dict[Axis, int]:
    """How long each axis of a decoder is."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "vocabulary": config.vocab_size,
        "hidden": config.hidden_size,
        "ffn": config.intermediate_size,
        "heads": config.num_attention_heads * head_dim,
        "kv_heads": config.num_key_value_heads * head_dim,
        "head_dim": head_dim,
    }
