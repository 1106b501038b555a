"""Int8 weights for small deployments on CPU: a quarter of the bytes, and matrix products in int8.

A weight [out, in] becomes int8 with one float32 scale per output channel (an embedding: per entry), so that its
largest value is 127. Activations are quantized as they come, one scale per token: a text's vector does not depend
on the texts beside it, as it would with torch's `quantize_dynamic`, which takes one scale for a whole pass. Norms
stay float32. The scheme is that of LLM.int8 (arXiv 2208.07339) without its outliers.

Ours rather than torchao's or torch's own: docs/family.md has the times and cosines of all three.

Shapes: T tokens of a pass, i inputs, o outputs, v entries, d hidden size.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from f2llm_ray.base.errors import RunError
from f2llm_ray.model.dense import PREFIX, put_dense
from f2llm_ray.model.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS_FILE = "model-int8.safetensors"
"""Another name than the stock one: a library that knows no scales must not take the numbers for weights."""
TOP = 127


def quantize_rows(weight_oi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as int8 [o, i] and the scales [o] that give it back, each value to half a scale."""
    scale_o = weight_oi.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / TOP
    return torch.round(weight_oi / scale_o[:, None]).to(torch.int8), scale_o


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and activations."""

    scale: torch.Tensor

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.out_features = outputs
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.zeros(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [.., i] to [.., o]."""
        x_Ti = x.flatten(0, -2)
        scale_T1 = torch.linalg.vector_norm(x_Ti, float("inf"), dim=-1, keepdim=True)
        scale_T1 = scale_T1.clamp_min_(torch.finfo(torch.float32).tiny).div_(TOP)
        # Not public, but what torchao builds on; int8 products summed in int32, exactly.
        sums_To = torch._int_mm((x_Ti / scale_T1).round_().to(torch.int8), self.weight.T)  # noqa: SLF001
        y_To = (sums_To * scale_T1).mul_(self.scale)
        if self.bias is not None:
            y_To += self.bias
        return y_To.unflatten(0, x.shape[:-1])


class Int8Embedding(nn.Module):
    """An embedding with int8 rows; what is looked up is float32."""

    scale: torch.Tensor

    def __init__(self, entries: int, dims: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(entries, dims, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.zeros(entries))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Maps ids [..] to rows [.., d]."""
        return self.weight[ids] * self.scale[ids].unsqueeze(-1)


def quantize(backbone: PreTrainedModel, *, embeddings: bool = True) -> PreTrainedModel:
    """A copy of a float32 backbone with int8 linear layers, and int8 input embeddings where asked for."""
    small = _with_int8_layers(copy.deepcopy(backbone), embeddings=embeddings)
    float_state, names = backbone.state_dict(), small.state_dict().keys()
    state = {name: value for name, value in float_state.items() if name in names}
    for name in names:
        if name.endswith(".scale"):
            weight = name.removesuffix("scale") + "weight"
            state[weight], state[name] = quantize_rows(float_state[weight])
    if embeddings:
        # Gemma's embedding multiplies what it looks up; the int8 one has that in its scales.
        state[f"{family_of(backbone.config).embeddings}.scale"] *= getattr(
            backbone.get_input_embeddings(), "scalar_embed_scale", 1.0
        )
    small.load_state_dict(state)
    return small.eval()


def load_quantized(folder: Path) -> PreTrainedModel:
    """The backbone of a folder made by `shrink.quantize.save_quantized`, on CPU.

    Raises:
        RunError: a file is missing or damaged, or holds other weights than the config says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel

    path = folder / WEIGHTS_FILE
    try:
        state = load_file(path)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"{folder}: cannot be loaded as a model with int8 weights: {error}") from None
    family = family_of(config, str(folder))
    backbone = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False, **family.options)
    if f"{PREFIX}weight" in state:
        outputs, inputs = state[f"{PREFIX}weight"].shape
        put_dense(backbone, nn.Linear(inputs, outputs, bias=f"{PREFIX}bias" in state))
    small: PreTrainedModel = _with_int8_layers(backbone, embeddings=f"{family.embeddings}.scale" in state)
    try:
        small.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(f"{path}: other weights than config.json says: {error}") from None
    return small.eval()


def is_quantized(folder: Path | str) -> bool:
    """Whether a model folder holds int8 weights."""
    return (Path(folder) / WEIGHTS_FILE).is_file()


def _with_int8_layers(backbone: PreTrainedModel, *, embeddings: bool) -> PreTrainedModel:
    """Puts empty int8 layers in place of the float ones."""
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                layer = Int8Linear(child.in_features, child.out_features, bias=child.bias is not None)
                setattr(parent, name, layer)
    if embeddings:
        table = backbone.get_input_embeddings()
        backbone.set_input_embeddings(Int8Embedding(table.num_embeddings, table.embedding_dim))
    return backbone
