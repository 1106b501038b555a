"""Pruning is masking: the small model computes what the parent would with the removed parts at zero."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from f2llm_ray.base.errors import RecipeError, RunError
from f2llm_ray.engine.encode import encode
from f2llm_ray.model.families import check_cut, family_of
from f2llm_ray.model.prune import Importance, Kept, choose, prune
from f2llm_ray.model.settings import Prune
from f2llm_ray.model.sizes import FAMILY, count_parameters, parameters, random_backbone
from f2llm_ray.shrink.importance import chance
from tests.model.small import DECODERS, ENCODERS, FAMILIES, TWO_WAY_GEMMA, VOCABULARY, backbone, texts

ALL = Kept(
    layers=(0, 1, 2), hidden=tuple(range(32)), ffn=(tuple(range(48)),) * 3, kv_heads=((0, 1),) * 3, vocabulary=None
)
ENCODER = replace(ALL, kv_heads=((0, 1, 2, 3),) * 3)
HIDDEN = tuple(range(1, 32, 2))
RMS_NORM = (*DECODERS, TWO_WAY_GEMMA)
CUTS = {
    "layers": {"layers": (0, 2), "ffn": ALL.ffn[:2], "kv_heads": ALL.kv_heads[:2]},
    "hidden": {"hidden": HIDDEN},
    "ffn": {"ffn": (tuple(range(0, 48, 3)), tuple(range(10, 26)), tuple(range(32, 48)))},
    "kv_heads": {"kv_heads": ((0,), (1,), (1,))},
    "vocabulary": {"vocabulary": tuple(range(0, VOCABULARY, 2))},
    "all": {
        "layers": (1, 2),
        "hidden": HIDDEN,
        "ffn": (tuple(range(0, 48, 3)), tuple(range(10, 26))),
        "kv_heads": ((1,), (0,)),
    },
}


def vectors(model: torch.nn.Module, given: list) -> torch.Tensor:
    with torch.no_grad():
        return encode(model, given, pooling="last", tokens_per_pass=10_000)


def masked(parent: torch.nn.Module, kept: Kept) -> torch.nn.Module:
    """The slow reference: the parent with all that is removed set to zero."""
    model = copy.deepcopy(parent)
    channels = [channel for channel in range(32) if channel not in kept.hidden]
    with torch.no_grad():
        model.embed_tokens.weight[:, channels] = 0
        for number, layer in enumerate(model.layers):
            attention, ffn = layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight
            attention[channels] = 0
            ffn[channels] = 0
            if number not in kept.layers:
                attention.zero_()
                ffn.zero_()
                continue
            place = kept.layers.index(number)
            ffn[:, [channel for channel in range(48) if channel not in kept.ffn[place]]] = 0
            for group in {0, 1} - set(kept.kv_heads[place]):
                attention[:, 16 * group : 16 * (group + 1)] = 0
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_keeping_everything_returns_the_same_outputs_bit_for_bit(model_type: str, tied: bool) -> None:
    parent = backbone(model_type, tied=tied)
    small = prune(parent, choose(chance(parent.config, 0), Prune(model="x", layers=3)))
    assert small.config.to_dict() == parent.config.to_dict()
    assert torch.equal(vectors(small, texts()), vectors(parent, texts()))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("model_type", RMS_NORM)
def test_removing_parts_equals_masking_them(model_type: str, cut: str) -> None:
    parent = backbone(model_type)
    kept = Kept(**{**vars(ALL), **CUTS[cut]})
    small = prune(parent, kept)
    given = texts()
    if kept.vocabulary is not None:  # every second token stays, and half its number is its new one
        given = [text // 2 * 2 for text in given]
    expected = vectors(masked(parent, kept), given)[:, list(kept.hidden)]
    found = vectors(small, [text // 2 for text in given] if kept.vocabulary is not None else given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.abs().mean() > 0.3
    if cut != "vocabulary":
        assert (expected - vectors(parent, given)[:, list(kept.hidden)]).abs().mean() > 0.05


def test_special_tokens_of_the_config_get_their_new_numbers() -> None:
    parent = backbone("llama")
    parent.config.eos_token_id = [8, 11]
    small = prune(parent, Kept(**{**vars(ALL), "vocabulary": (2, 5, 8)}))
    assert (small.config.vocab_size, small.config.bos_token_id, small.config.eos_token_id) == (3, 0, [2])


@pytest.mark.parametrize("cut", ["layers", "ffn", "vocabulary"])
@pytest.mark.parametrize("model_type", ENCODERS)
def test_removing_parts_of_an_encoder_equals_masking_them(model_type: str, cut: str) -> None:
    parent = backbone(model_type)
    family = family_of(parent.config)
    wanted = {**CUTS[cut], **({"vocabulary": (1, 2, 4, *range(5, VOCABULARY, 2))} if cut == "vocabulary" else {})}
    if model_type == "xlm-roberta" and cut == "vocabulary":
        wanted["vocabulary"] = (*range(6), *range(7, VOCABULARY, 2))
    kept = Kept(
        **{**vars(ENCODER), **wanted, "kv_heads": ENCODER.kv_heads[: len(wanted.get("layers", ALL.layers))]}
    )
    small, reference, given = prune(parent, kept), copy.deepcopy(parent), texts()
    with torch.no_grad():
        for place, number in enumerate(kept.layers):
            gone = [channel for channel in range(48) if channel not in kept.ffn[place]]
            family.layers_of(reference)[number].get_submodule(family.ffn_out).weight[:, gone] = 0
    for number in sorted({0, 1, 2} - set(kept.layers), reverse=True):
        del family.layers_of(reference)[number]
    reference.config.num_hidden_layers = len(kept.layers)
    new = given
    if kept.vocabulary is not None:
        number = {old: place for place, old in enumerate(kept.vocabulary)}
        given = [np.array([kept.vocabulary[token % len(number)] for token in text]) for text in given]
        new = [np.array([number[token] for token in text]) for text in given]
    expected = vectors(reference, given)
    torch.testing.assert_close(vectors(small, new), expected, rtol=0, atol=1e-5)
    if cut != "vocabulary":
        assert (expected - vectors(parent, given)).abs().mean() > 0.05


@pytest.mark.parametrize("model_type", ENCODERS)
def test_what_an_encoder_cannot_lose_is_refused_with_the_reason(model_type: str) -> None:
    parent = backbone(model_type)
    for part, value, why in (
        ("hidden", 24, "mean over all channels"),
        ("kv_heads", 2, "channels, so that fewer heads"),
    ):
        kept = choose(chance(parent.config, 0), Prune(model="x", **{part: value}))
        with pytest.raises(RunError, match=f"prune.{part}: {model_type} cannot lose any: .*{why}"):
            prune(parent, kept)


def test_positions_that_are_counted_from_the_padding_token_keep_its_number() -> None:
    with pytest.raises(RecipeError, match="padding token's number would change"):
        prune(backbone("xlm-roberta"), replace(ENCODER, vocabulary=(2, 5, 8)))


def test_the_first_layer_of_modernbert_stays() -> None:
    importance = Importance(torch.ones(32), torch.ones(3, 48), torch.ones(3, 4), torch.tensor([0.0, 2.0, 1.0]))
    assert choose(importance, Prune(model="x", layers=2), first_layer_stays=True).layers == (0, 1)
    with pytest.raises(RecipeError, match=r"found \[1, 2\], expected numbers from 0 to 2, 0 among them"):
        choose(importance, Prune(model="x", layers=(1, 2)), first_layer_stays=True)


def test_layers_may_be_named_by_their_numbers() -> None:
    importance = chance(backbone("qwen3").config, 0)
    kept = choose(importance, Prune(model="x", layers=(0, 2)))
    assert kept.layers == (0, 2)
    assert len(kept.ffn) == len(kept.kv_heads) == 2
    assert Prune(model="x", layers=(0, 2)).count("layers") == Prune(model="x", layers=2).count("layers") == 2
    with pytest.raises(RecipeError, match=r"prune\.layers: found \[0, 3\], expected numbers from 0 to 2"):
        choose(importance, Prune(model="x", layers=(0, 3)))
    for wrong in ((), (1, 0), (1, 1)):
        with pytest.raises(ValidationError, match="expected a count, or different numbers that rise"):
            Prune(model="x", layers=wrong)
    assert family_of(backbone("modernbert").config).first_layer_stays


@pytest.mark.parametrize("model_type", RMS_NORM)
def test_the_result_has_the_shape_asked_for_and_loads(model_type: str, tmp_path: object) -> None:
    from transformers import AutoModel

    parent = backbone(model_type)
    wanted = Prune(model="x", layers=2, hidden=24, ffn=20, kv_heads=1)
    small = prune(parent, choose(chance(parent.config, 0), wanted))
    config = small.config
    shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads)
    assert shape == (2, 24, 20, 2)
    small.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is type(parent)
    torch.testing.assert_close(vectors(again, texts()), vectors(small, texts()), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["80m", "0.6b"])
def test_arithmetic_of_the_family_table_is_that_of_the_sizes(name: str) -> None:
    with torch.device("meta"):
        model = random_backbone(FAMILY[name], 1000, seed=0)
    assert count_parameters(model)[0] == parameters(FAMILY[name], 1000)


def test_other_families_are_refused_by_name() -> None:
    from transformers import AutoConfig

    named = re.escape(f"'gpt2' is not a family known here; known are {sorted({f.split()[0] for f in FAMILIES})}")
    with pytest.raises(RunError, match=named):
        family_of(AutoConfig.for_model("gpt2"))
    with pytest.raises(RunError, match="'bert' with is_decoder"):
        family_of(AutoConfig.for_model("bert", is_decoder=True))
    with pytest.raises(RunError, match="'llama' with attention_bias"):
        check_cut(AutoConfig.for_model("llama", attention_bias=True), {})


def test_more_than_there_is_and_shapes_that_cannot_be_are_refused() -> None:
    importance = Importance(torch.ones(8), torch.ones(2, 4), torch.ones(2, 2), torch.ones(2))
    with pytest.raises(RecipeError, match=r"prune\.layers: 3 wanted, but the parent has 2"):
        choose(importance, Prune(model="x", layers=3))
    with pytest.raises(RecipeError, match=r"prune\.kv_heads: 3 wanted, but the parent has 2"):
        choose(importance, Prune(model="x", kv_heads=3))
    parent = backbone("llama")
    with pytest.raises(RecipeError, match=r"prune: no llama has this shape: .*multiple"):
        prune(parent, choose(chance(parent.config, 0), Prune(model="x", hidden=30)))
