"""A backbone and its pooling as one module with fixed inputs and outputs, of which other files are traced.

Positions and the attention bias come of the mask alone, so that padding may be on either side. The bias is ours
and goes to the stock class as it is: left alone, transformers would look for packed texts in the positions.
Shapes: n texts, t places of the longest, d hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import normalize

from f2llm_ray.base.errors import RunError
from f2llm_ray.model.checkpoint import load_backbone
from f2llm_ray.model.dense import dense_of
from f2llm_ray.model.families import Pooling, family_of
from f2llm_ray.model.int8 import is_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAR = -1e4
"""Added to the score of a place that is not seen: its exponent is 0, and finite in float16 too, so that a padded
place, which sees nothing, is no NaN."""
SLIDING, FULL = "sliding_attention", "full_attention"


def export_backbone(model: Path) -> PreTrainedModel:
    """The float32 backbone of a model folder, on CPU.

    Raises:
        RunError: it does not load, or has int8 weights of ours, which no other runtime knows.
    """
    if is_quantized(model):
        raise RunError(f"{model}: its weights are int8; export the model that it was made from")
    from safetensors import SafetensorError

    try:
        backbone = load_backbone(model).eval()
    except SafetensorError as error:
        raise RunError(f"{model}: cannot be loaded as a model: {error}") from None
    backbone.config.use_cache = False
    return backbone


class Graph(nn.Module):
    """Ids and mask [n, t] in, hidden states [n, t, d] and unit vectors [n, d], or of a map's dims, out."""

    def __init__(self, backbone: PreTrainedModel, pooling: Pooling) -> None:
        super().__init__()
        self.backbone, self.pooling = backbone, pooling
        self.family = family_of(backbone.config)
        self.first = self.family.first_position(backbone.config)
        self.kinds = set(getattr(backbone.config, "layer_types", None) or ())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the files of other runtimes compute; the mask is 1 at a text's tokens and 0 at padding."""
        count_nt = attention_mask.cumsum(1)
        hidden_ntd = self.backbone(
            input_ids=input_ids,
            attention_mask=self._bias(attention_mask),
            position_ids=(count_nt - 1).clamp_min(0) + self.first,
        ).last_hidden_state
        weight_nt = attention_mask
        if self.pooling == "last":
            weight_nt = weight_nt * (count_nt == count_nt[:, -1:])
        elif self.pooling == "cls":
            weight_nt = weight_nt * (count_nt == 1)
        weight_nt = weight_nt.to(hidden_ntd.dtype)
        weight_nt = weight_nt / weight_nt.sum(1, keepdim=True).clamp_min(1)
        vectors_nd = (weight_nt[:, None] @ hidden_ntd)[:, 0]
        dense = dense_of(self.backbone)
        vectors_nd = vectors_nd if dense is None else dense(vectors_nd)
        return hidden_ntd, normalize(vectors_nd, dim=-1)

    def _bias(self, mask_nt: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """What is added to the scores [n, 1, t or 1, t]; of each kind of layer where there are kinds."""
        place_t = torch.arange(mask_nt.shape[1], device=mask_nt.device)
        behind_tt = place_t[:, None] - place_t
        seen = mask_nt[:, None, None]
        if self.family.causal:
            seen = seen * (behind_tt >= 0)
        biases = {FULL: seen}
        if SLIDING in self.kinds:
            biases[SLIDING] = seen * (behind_tt.abs() < self.family.window(self.backbone.config))
        biases = {kind: (1 - seen.to(torch.float32)) * FAR for kind, seen in biases.items()}
        return biases if self.kinds else biases[FULL]
