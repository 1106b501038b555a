"""For every family and pooling a text's vector is that of the stock class, however texts share a pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from f2llm_ray.engine.attention import packs, use_varlen
from f2llm_ray.engine.encode import encode
from f2llm_ray.model.families import POOLINGS, Pooling, family_of, without_dropout
from tests.model.small import FAMILIES, backbone, texts

Vectors = torch.Tensor


def stock(model: Any, given: list[np.ndarray], pooling: Pooling) -> Vectors:
    """The slow reference: all texts padded into one batch of the stock class, with its attention mask."""
    longest = max(map(len, given))
    pad = model.config.pad_token_id or 0
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in given])
    ids = torch.tensor([[*text.tolist(), *[pad] * (longest - len(text))] for text in given])
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    if pooling == "mean":
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return hidden[torch.arange(len(given)), 0 if pooling == "cls" else mask.sum(1) - 1]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_vectors_and_gradients_are_those_of_the_stock_class(kind: str, pooling: Pooling) -> None:
    model = without_dropout(backbone(kind)).double().train()
    given = [text for text in texts(25) if 5 not in text]  # the token of padding; the stock class skips its place
    given.append(np.arange(6, 58, dtype=np.uint32))  # longer than the windows that slide
    target = torch.randn(len(given), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    runs = []

    def run(vectors: Vectors) -> None:
        model.zero_grad()
        (vectors * target).sum().backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        runs.append((vectors.detach(), torch.cat(gradients)))

    run(stock(model, given, pooling))
    run(torch.cat([stock(model, [text], pooling) for text in given]))
    for budget in (64, 10**9):
        run(encode(model, given, pooling=pooling, tokens_per_pass=budget))
    use_varlen(model)
    assert packs(model)
    for budget in (64, 10**9):
        run(encode(model, given, pooling=pooling, tokens_per_pass=budget))
    (expected, gradients), *others = runs
    assert expected.abs().mean() > 0.05
    for found, found_gradients in others:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        # Gemma's norms and ModernBERT's rotation are in float32 in their classes, whatever the model is in.
        inexact = kind.startswith(("gemma3_text", "modernbert"))
        tolerance = {"rtol": 1e-3, "atol": 1e-4} if inexact else {"rtol": 0, "atol": 1e-8}
        torch.testing.assert_close(found_gradients, gradients, **tolerance)


@pytest.mark.parametrize("kind", FAMILIES)
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    model, given = without_dropout(backbone(kind)).double().train(), texts(8)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        encode(model, given, pooling="mean", tokens_per_pass=64).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_weight_is_in_the_table(kind: str) -> None:
    model = backbone(kind)
    family = family_of(model.config)
    for name, value in model.state_dict().items():
        assert len(family.weight(name).axes) == value.ndim
        assert (family.layer_of(name) is None) == (family.layers + "." not in name)
    assert model.get_submodule(family.embeddings) is model.get_input_embeddings()
    assert len(family.layers_of(model)) == 3
