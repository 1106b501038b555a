"""The families of backbones that are known here: how each attends, counts positions, pools, and what can be cut.

A backbone of another family is refused by name (`family_of`): run as one of these it would give wrong vectors
without a sign of it.

Cutting the hidden size from d to d' must not move what the parts that stay compute. An RMSNorm divides by the
root mean square over all channels; over the d' that stay, the mean of their squares is d / d' times that of the
parent with zeros in place of the others. With c = sqrt(d' / d), all that is written to the residual stream is
multiplied by c, so that its mean square (and the weight of the norm's eps beside it) is the parent's, and the
norms that read it are divided by c. `Weight.power` says which power of c a weight takes. A LayerNorm also takes
off the mean over all channels, which the channels that stay do not know: there the hidden size cannot be cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from f2llm_ray.base.errors import RunError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

Pooling = Literal["last", "mean", "cls"]
"""How a text's vector comes of its tokens' last hidden states: the last one, their mean, or the first one."""
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

Axis = Literal[
    "vocabulary", "positions", "types", "hidden", "ffn", "ffn_pair", "heads", "kv_heads", "qkv", "head_dim"
]
"""What one dimension of a weight runs over. "heads" and "kv_heads" are heads times head_dim; "qkv" three times
that, queries first; "ffn_pair" the FFN's channels and those of its gate after; "types" are BERT's segments."""
LOOKED_UP: set[Axis] = {"vocabulary", "positions", "types"}
"""Axes of embeddings: their weights are looked up and not multiplied with."""
Part = Literal["layers", "hidden", "ffn", "kv_heads", "vocabulary"]
"""What pruning can cut."""


@dataclass(frozen=True)
class Weight:
    """One weight of a backbone; linear ones are [out, in]."""

    axes: tuple[Axis, ...]
    power: int = 0
    """Of c: 1 where it writes to the residual stream, -1 where it is the norm that reads it."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of backbone, as Hugging Face names it and its modules."""

    causal: bool
    """Whether a token sees only those before it; else it sees all of its text."""
    pooling: Pooling
    """Of a backbone that does not say its own."""
    positions_after_padding: bool = False
    """Positions are counted from past the number of the padding token."""
    window_without_itself: bool = False
    """`sliding_window` of a config leaves out the token itself."""
    embeddings: str
    """The module of the input embeddings."""
    layers: str
    """The list of layers."""
    norm: str | None
    """The norm after the last layer, where there is one."""
    attention_out: str
    """In a layer: the linear map that what the heads give goes through."""
    ffn_out: str
    """In a layer: the last linear map of the FFN."""
    layer: Mapping[str, Weight]
    """The weights of each layer, by their names in it."""
    ends: Mapping[str, Weight]
    """Those outside the layers."""
    norm_adds_one: bool = False
    """Norms multiply by 1 + weight."""
    first_layer_stays: bool = False
    """The first layer reads the embeddings without a norm, which no other layer can take over."""
    biases: bool = True
    """Whether the biases in the table are there by default."""
    cannot_cut: Mapping[Part, str]
    """Parts that pruning cannot cut, and why."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What its class is made with."""

    def weight(self, name: str) -> Weight:
        """The weight of a name in the state dict.

        Raises:
            RunError: the family has none of this name.
        """
        inside = name.removeprefix(f"{self.layers}.").partition(".")[2]
        found = self.ends.get(name) or self.layer.get(inside)
        if found is None:
            raise RunError(f"weight {name!r} is not one of {[*self.ends, *self.layer]}: it cannot be pruned")
        return found

    def parameters(self, sizes: Mapping[Axis, int], layers: int) -> tuple[int, int]:
        """All parameters of a model with axes so long and so many layers, and those outside its embeddings."""
        inside = layers * sum(math.prod(sizes[axis] for axis in weight.axes) for weight in self._there(self.layer))
        if self.first_layer_stays:  # its first norm is not there
            inside -= sizes["hidden"]
        tables = 0
        for weight in self._there(self.ends):
            size = math.prod(sizes[axis] for axis in weight.axes)
            tables += size if LOOKED_UP & set(weight.axes) else 0
            inside += 0 if LOOKED_UP & set(weight.axes) else size
        return inside + tables, inside

    def _there(self, weights: Mapping[str, Weight]) -> list[Weight]:
        return [weight for name, weight in weights.items() if self.biases or not name.endswith(".bias")]

    @property
    def linear(self) -> dict[str, Weight]:
        """The linear weights of a layer, by the names of their modules in it."""
        return {
            name.removesuffix(".weight"): weight for name, weight in self.layer.items() if len(weight.axes) > 1
        }

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that a weight is in; None for one outside the layers."""
        inside = name.removeprefix(f"{self.layers}.")
        return None if inside == name else int(inside.partition(".")[0])

    def layers_of(self, backbone: PreTrainedModel) -> torch.nn.ModuleList:
        """The layers of a backbone."""
        return cast("torch.nn.ModuleList", backbone.get_submodule(self.layers))

    def last_norm(self, backbone: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
        """What the norm after the last layer makes of a layer's output; the output itself where there is none."""
        if self.norm is None:
            return hidden
        return cast("torch.Tensor", backbone.get_submodule(self.norm)(hidden))

    @property
    def readers(self) -> list[str]:
        """Names, in a layer, of the norms that read the residual stream."""
        return [name.removesuffix(".weight") for name, weight in self.layer.items() if weight.power == -1]

    def first_position(self, config: PreTrainedConfig) -> int:
        """The position of a text's first token."""
        return int(config.pad_token_id) + 1 if self.positions_after_padding else 0

    def max_tokens(self, config: PreTrainedConfig) -> int | None:
        """Tokens of the longest text that a table of positions allows; None where they are rotary."""
        if not any("positions" in weight.axes for weight in self.ends.values()):
            return None
        return int(config.max_position_embeddings) - self.first_position(config)

    def window(self, config: PreTrainedConfig) -> int:
        """Tokens to a side that a token sees in a layer that slides, itself among them."""
        return int(config.sliding_window) + self.window_without_itself


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

_LLAMA = Family(
    causal=True,
    pooling="last",
    embeddings="embed_tokens",
    layers="layers",
    norm="norm",
    attention_out="self_attn.o_proj",
    ffn_out="mlp.down_proj",
    layer={**_ATTENTION, **_FFN, **_NORMS},
    ends={"embed_tokens.weight": Weight(("vocabulary", "hidden"), 1), "norm.weight": Weight(("hidden",), -1)},
    cannot_cut={},
)
_GEMMA = replace(
    _LLAMA,
    layer={
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
    ends={"embed_tokens.weight": Weight(("vocabulary", "hidden")), "norm.weight": Weight(("hidden",), -1)},
    norm_adds_one=True,
)

_OF_LAYER_NORM: dict[Part, str] = {
    "hidden": "its LayerNorms take off the mean over all channels, which a part of the channels does not have",
    "kv_heads": "its class gives each head hidden_size / num_attention_heads channels, so that fewer heads of the "
    "same size are no stock model",
}


def _linear(name: str, out: Axis, into: Axis) -> dict[str, Weight]:
    return {f"{name}.weight": Weight((out, into)), f"{name}.bias": Weight((out,))}


def _layer_norm(name: str) -> dict[str, Weight]:
    return {f"{name}.weight": Weight(("hidden",), -1), f"{name}.bias": Weight(("hidden",))}


_BERT = Family(
    causal=False,
    pooling="mean",
    embeddings="embeddings.word_embeddings",
    layers="encoder.layer",
    norm=None,
    attention_out="attention.output.dense",
    ffn_out="output.dense",
    layer={
        **_linear("attention.self.query", "heads", "hidden"),
        **_linear("attention.self.key", "kv_heads", "hidden"),
        **_linear("attention.self.value", "kv_heads", "hidden"),
        **_linear("attention.output.dense", "hidden", "heads"),
        **_layer_norm("attention.output.LayerNorm"),
        **_linear("intermediate.dense", "ffn", "hidden"),
        **_linear("output.dense", "hidden", "ffn"),
        **_layer_norm("output.LayerNorm"),
    },
    ends={
        "embeddings.word_embeddings.weight": Weight(("vocabulary", "hidden")),
        "embeddings.position_embeddings.weight": Weight(("positions", "hidden")),
        "embeddings.token_type_embeddings.weight": Weight(("types", "hidden")),
        **_layer_norm("embeddings.LayerNorm"),
    },
    cannot_cut=_OF_LAYER_NORM,
    options={"add_pooling_layer": False},  # a map of the first token for next-sentence prediction
)
_MODERNBERT = Family(
    causal=False,
    pooling="mean",
    embeddings="embeddings.tok_embeddings",
    layers="layers",
    norm="final_norm",
    attention_out="attn.Wo",
    ffn_out="mlp.Wo",
    window_without_itself=True,
    first_layer_stays=True,
    biases=False,
    layer={
        **_layer_norm("attn_norm"),
        **_linear("attn.Wqkv", "qkv", "hidden"),
        **_linear("attn.Wo", "hidden", "heads"),
        **_layer_norm("mlp_norm"),
        **_linear("mlp.Wi", "ffn_pair", "hidden"),
        **_linear("mlp.Wo", "hidden", "ffn"),
    },
    ends={
        "embeddings.tok_embeddings.weight": Weight(("vocabulary", "hidden")),
        **_layer_norm("embeddings.norm"),
        **_layer_norm("final_norm"),
    },
    cannot_cut=_OF_LAYER_NORM,
)

FAMILIES: dict[str, Family] = {
    "qwen3": replace(_LLAMA, layer={**_ATTENTION, **_HEAD_NORMS, **_FFN, **_NORMS}),
    "llama": _LLAMA,
    "gemma3_text": _GEMMA,
    "bert": _BERT,
    "xlm-roberta": replace(_BERT, positions_after_padding=True),
    "modernbert": _MODERNBERT,
}
"""By `model_type` of config.json."""


def family_of(config: PreTrainedConfig | Mapping[str, Any], place: str = "") -> Family:
    """The family of a model's config, or of what its config.json holds.

    Gemma 3 with bidirectional attention (EmbeddingGemma) is one that sees all of a text and takes the mean.

    Args:
        config: of the model.
        place: where the config is, which the error names.

    Raises:
        RunError: the model is of none of `FAMILIES`, or an encoder class set up as a decoder.
    """

    def said(name: str) -> Any:
        return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)

    where, kind = f"{place}: " if place else "", said("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise RunError(f"{where}model_type {kind!r} is not a family known here; known are {sorted(FAMILIES)}")
    if not family.causal and said("is_decoder"):
        raise RunError(f"{where}model_type {kind!r} with is_decoder is not known here; expected an encoder")
    if said("use_bidirectional_attention"):
        if kind != "gemma3_text":
            raise RunError(f"{where}model_type {kind!r} with use_bidirectional_attention is not known here")
        return replace(family, causal=False, pooling="mean")
    return family


def refuse_cut(cannot_cut: Mapping[Part, str], parts: Iterable[Part], place: str, model: str) -> None:
    """Raises RunError where a part is cut that a model cannot lose; it names the place in the recipe."""
    for part in parts:
        if part in cannot_cut:
            raise RunError(f"{place}.{part}: {model} cannot lose any: {cannot_cut[part]}")


def check_cut(config: PreTrainedConfig, parts: Iterable[Part]) -> None:
    """Refuses to cut parts that a model's family cannot lose.

    Raises:
        RunError: the model cannot lose such a part, or has biases where its family has none.
    """
    family, kind = family_of(config), config.model_type
    refuse_cut(family.cannot_cut, parts, "prune", kind)
    for flag in ("attention_bias", "mlp_bias"):
        if family.causal and getattr(config, flag, None):
            raise RunError(f"model_type {kind!r} with {flag} cannot be pruned; expected without")


def axis_sizes(config: PreTrainedConfig) -> dict[Axis, int]:
    """How long each axis of a backbone is."""
    return axes_of(
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        types=getattr(config, "type_vocab_size", 0),
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=kv_heads(config),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )


def axes_of(
    *, vocabulary: int, positions: int, types: int, hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int
) -> dict[Axis, int]:
    """How long each axis is, from the sizes of a model."""
    return {
        "vocabulary": vocabulary,
        "positions": positions,
        "types": types,
        "hidden": hidden,
        "ffn": ffn,
        "ffn_pair": 2 * ffn,
        "heads": heads * head_dim,
        "kv_heads": kv_heads * head_dim,
        "qkv": (heads + 2 * kv_heads) * head_dim,
        "head_dim": head_dim,
    }


def kv_heads(config: PreTrainedConfig) -> int:
    """Key-value heads of each layer; in encoders each query head has its own."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def without_dropout(backbone: PreTrainedModel) -> PreTrainedModel:
    """The backbone with all dropout off, also in training; its config stays as it is.

    Dropout would make a run depend on how its batches are split among workers, and a text's vector on its pass.
    """
    for module in backbone.modules():
        if type(module).__name__ == "Dropout":
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return backbone
