"""The encoder: token lists in, one vector each out, with little or no padding.

Training, evaluation, the teacher, bulk embedding and serving all come through `encode`.
Shapes: n texts, t tokens of the longest text of a pass, T places of it, d hidden size, or what a map makes of it,
E exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine.attention import packs
from f2llm_ray.engine.pooling import Places, pool
from f2llm_ray.model.dense import dense_of, vector_dims
from f2llm_ray.model.families import Pooling, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A padded pass of at least this many tokens is long enough; from there on a text much shorter than the longest of
# the pass starts a new one.
FULL_PASS = 1024
SHORTEST = 0.8


def plan_passes(lengths: Sequence[int], tokens_per_pass: int) -> list[list[int]]:
    """Groups texts of similar lengths into passes, longest first.

    A pass holds at most `tokens_per_pass` tokens, padding included (a single longer text is a pass of its
    own), and once it holds `FULL_PASS` tokens it takes no text shorter than `SHORTEST` of its longest.

    Returns:
        The indices of the texts of each pass; together they are 0..n-1, each once.
    """
    passes: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        width = len(passes[-1]) if passes else 0
        full = (width + 1) * longest > tokens_per_pass
        uneven = width * longest >= FULL_PASS and lengths[index] < SHORTEST * longest
        if not passes or full or uneven:
            passes.append([])
            longest = lengths[index]
        passes[-1].append(index)
    return passes


def plan_packs(lengths: Sequence[int], tokens_per_pass: int) -> list[list[int]]:
    """Groups texts, longest first, into passes of at most `tokens_per_pass` tokens; a longer text has its own."""
    passes: list[list[int]] = []
    held = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not passes or held + lengths[index] > tokens_per_pass:
            passes.append([])
            held = 0
        passes[-1].append(index)
        held += lengths[index]
    return passes


def passes_of(backbone: PreTrainedModel, tokens: Sequence[Tokens], tokens_per_pass: int) -> list[list[int]]:
    """The passes in which a model encodes texts: indices of the texts of each, every text once."""
    lengths = [len(text) for text in tokens]
    return (plan_packs if packs(backbone) else plan_passes)(lengths, tokens_per_pass)


def encode(
    backbone: PreTrainedModel,
    tokens: Sequence[Tokens],
    *,
    pooling: Pooling,
    tokens_per_pass: int,
    exits: Sequence[int] = (),
) -> torch.Tensor:
    """Turns token lists into vectors [n, d] in the given order, before normalisation.

    The backbone is one of Hugging Face's without its language-model head, of a family in `model.families`. In the
    engine and in training the texts of a pass lie end to end (`engine/attention.py`). In a model that has kept
    the stock attention they are of similar lengths and padded on the right. There a causal model never looks from
    a real token, so no mask is needed; another one gets a mask where lengths differ. Either way a vector depends
    on its text alone.

    With exits, numbers of layers, the output is [n, (1 + E) * d]: the model's vectors, then those of the models of
    its first so many layers (`model.prune.first_layers`), all from the one pass.
    """
    if not tokens:
        return torch.zeros(0, (1 + len(exits)) * vector_dims(backbone), device=backbone.device)
    passes = passes_of(backbone, tokens, tokens_per_pass)
    vectors = [encode_pass(backbone, [tokens[index] for index in indices], pooling, exits) for indices in passes]
    order = torch.tensor([index for indices in passes for index in indices], device=backbone.device)
    return torch.cat(vectors)[torch.argsort(order)]


def encode_pass(
    backbone: PreTrainedModel, tokens: Sequence[Tokens], pooling: Pooling, exits: Sequence[int] = ()
) -> torch.Tensor:
    """The vectors of the texts of one pass as `encode` gives them: packed into one row, or padded on the right."""
    places = places_of(backbone, tokens)
    inputs = (_packed if packs(backbone) else _padded)(backbone, tokens, places)
    found = backbone(use_cache=False, **inputs, **({"output_hidden_states": True} if exits else {}))
    last_norm = partial(family_of(backbone.config).last_norm, backbone)
    hidden = [found.last_hidden_state, *(last_norm(found.hidden_states[layers]) for layers in exits)]
    return torch.cat([vectors_of(backbone, of.flatten(0, 1), places, pooling) for of in hidden], dim=1)


def vectors_of(
    backbone: PreTrainedModel, hidden_Td: torch.Tensor, places: Places, pooling: Pooling
) -> torch.Tensor:
    """The vectors of the texts of a pass from its last hidden states: pooled, and mapped where there is a map."""
    pooled_nd = pool(hidden_Td, places, pooling)
    dense = dense_of(backbone)
    mapped: torch.Tensor = pooled_nd if dense is None else dense(pooled_nd)
    return mapped


def places_of(backbone: PreTrainedModel, tokens: Sequence[Tokens]) -> Places:
    """Where the texts of one pass lie in it."""
    lengths_n = np.array([len(text) for text in tokens])
    return Places.packed(lengths_n) if packs(backbone) else Places.padded(lengths_n)


def _packed(backbone: PreTrainedModel, tokens: Sequence[Tokens], places: Places) -> dict[str, Any]:
    """The inputs of a pass whose texts lie end to end."""
    lengths_n = places.lengths_n
    first = family_of(backbone.config).first_position(backbone.config)
    positions = places.tokens - np.repeat(places.starts_n, lengths_n) + first

    def tensor(values: np.ndarray[Any, Any], dtype: type = np.int64) -> torch.Tensor:
        return torch.from_numpy(values.astype(dtype)).to(backbone.device)

    return {
        "input_ids": tensor(np.concatenate(tokens))[None],
        "position_ids": tensor(positions)[None],
        "starts_n1": tensor(np.append(places.starts_n, lengths_n.sum()), np.int32),
        "longest": int(lengths_n.max()),
    }


def _padded(backbone: PreTrainedModel, tokens: Sequence[Tokens], places: Places) -> dict[str, Any]:
    """The inputs of a pass whose texts are padded on the right."""
    lengths_n = places.lengths_n
    family, longest = family_of(backbone.config), int(lengths_n.max())
    padded = np.zeros((len(tokens), longest), dtype=np.int64)
    for row, text in zip(padded, tokens, strict=True):
        row[: len(text)] = text
    device = backbone.device
    inputs = {"input_ids": torch.from_numpy(padded).to(device)}
    if not family.causal and lengths_n.min() < longest:
        inputs["attention_mask"] = torch.from_numpy(np.arange(longest) < lengths_n[:, None]).to(device)
    first = family.first_position(backbone.config)
    if first:  # else the class would take every token with the id of padding for padding
        inputs["position_ids"] = torch.arange(first, first + longest, device=device)[None].expand(padded.shape)
    return inputs
