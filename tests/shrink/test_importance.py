"""Scores: dead parts last, padding without a say, and the same numbers however the work is split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.drawn import by_turns
from f2llm_ray.engine.attention import use_varlen
from f2llm_ray.engine.encode import encode
from f2llm_ray.engine.settings import Compute
from f2llm_ray.model.checkpoint import load_backbone
from f2llm_ray.model.families import POOLINGS, Pooling, family_of
from f2llm_ray.model.prune import choose
from f2llm_ray.model.settings import Prune
from f2llm_ray.run.folder import Folder
from f2llm_ray.shrink import part_scores
from f2llm_ray.shrink.importance import magnitude, measure, written_by_groups
from tests.model.small import DECODERS, ENCODERS, FAMILIES, TWO_WAY_GEMMA, backbone, texts
from tests.tiny import tiny_model

NAMES = ("hidden_d", "ffn_lf", "kv_heads_lg", "layers_l")


def dead_parts(model: torch.nn.Module) -> None:
    """Nothing leaves layer 1, FFN channels 7 and 9 of layer 0, group 0 of layer 2, and channel 5."""
    with torch.no_grad():
        model.embed_tokens.weight[:, 5] = 0
        for layer in model.layers:
            layer.self_attn.o_proj.weight[5] = 0
            layer.mlp.down_proj.weight[5] = 0
        model.layers[1].self_attn.o_proj.weight.zero_()
        model.layers[1].mlp.down_proj.weight.zero_()
        model.layers[0].mlp.down_proj.weight[:, 7] = 0
        model.layers[0].mlp.up_proj.weight[9] = 0
        model.layers[2].self_attn.v_proj.weight[:8] = 0


@pytest.mark.parametrize("model_type", [*DECODERS, TWO_WAY_GEMMA])
def test_dead_parts_are_the_first_to_go(model_type: str) -> None:
    model = backbone(model_type, seed=1)
    dead_parts(model)
    importance = measure(model, texts(), pooling="last", tokens_per_pass=10_000).importance()
    assert choose(importance, Prune(model="x", layers=2)).layers == (0, 2)
    kept = choose(importance, Prune(model="x", hidden=31, ffn=46, kv_heads=1))
    assert set(range(32)) - set(kept.hidden) == {5}
    assert set(range(48)) - set(kept.ffn[0]) == {7, 9}
    assert kept.kv_heads[2] == (1,)
    assert abs(float(importance.layers_l[1])) < 1e-6


@pytest.mark.parametrize("model_type", ENCODERS)
def test_dead_channels_of_an_encoder_are_the_first_to_go(model_type: str) -> None:
    model = backbone(model_type, seed=1)
    family = family_of(model.config)
    first, last = (family.layers_of(model)[number] for number in (0, 2))
    with torch.no_grad():
        first.get_submodule(family.ffn_out).weight[:, [7, 9]] = 0
        last.get_submodule(family.attention_out).weight[:, 8:16] = 0
    importance = measure(model, texts(), pooling="mean", tokens_per_pass=10_000).importance()
    kept = choose(importance, Prune(model="x", ffn=46, kv_heads=3))
    assert set(range(48)) - set(kept.ffn[0]) == {7, 9}
    assert kept.kv_heads[2] == (0, 2, 3)


class Skipped(torch.nn.Module):
    """A layer that passes its input on."""

    attention_type = "full_attention"

    def forward(self, hidden: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_layers_score_is_how_far_the_vectors_turn_without_it(model_type: str, pooling: Pooling) -> None:
    model, given = backbone(model_type), texts()
    found = measure(model, given, pooling=pooling, tokens_per_pass=200).importance().layers_l
    with torch.no_grad():
        whole = encode(model, given, pooling=pooling, tokens_per_pass=10_000)
        for skipped in range(3):
            less = backbone(model_type)
            family_of(less.config).layers_of(less)[skipped] = Skipped()
            without = encode(less, given, pooling=pooling, tokens_per_pass=10_000)
            turned = (1 - cosine_similarity(whole, without, dim=-1)).mean()
            torch.testing.assert_close(found[skipped].float(), turned, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_padding_packing_and_the_split_do_not_matter(model_type: str) -> None:
    model, given = backbone(model_type), texts(40)
    alone = measure(model, given[:1], pooling="last", tokens_per_pass=64)
    for text in given[1:]:  # one text a pass: no padding anywhere
        alone = alone + measure(model, [text], pooling="last", tokens_per_pass=64)
    padded = measure(model, given, pooling="last", tokens_per_pass=10_000)
    split = measure(model, given[:13], pooling="last", tokens_per_pass=100) + measure(
        model, given[13:], pooling="last", tokens_per_pass=100
    )
    use_varlen(model)
    packed = measure(model, given, pooling="last", tokens_per_pass=10_000)
    for other in (padded, split, packed):
        assert (other.tokens, other.texts) == (alone.tokens, alone.texts)
        for name in NAMES:
            expected = getattr(alone.importance(), name)
            torch.testing.assert_close(getattr(other.importance(), name), expected, rtol=1e-5, atol=1e-6)
        for wanted in (Prune(model="x", layers=2, hidden=20, ffn=30, kv_heads=1), Prune(model="x", hidden=8)):
            assert choose(other.importance(), wanted) == choose(alone.importance(), wanted)


def test_what_groups_write_is_the_norm_of_their_part_of_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    x_Th = torch.randn(9, 12, generator=generator)
    weight_dh = torch.randn(7, 12, generator=generator)
    for group, found_T in enumerate(written_by_groups(x_Th, weight_dh, 3).T):
        part = slice(4 * group, 4 * (group + 1))
        torch.testing.assert_close(found_T, (x_Th[:, part] @ weight_dh[:, part].T).norm(dim=1))


def test_magnitude_sees_the_weights() -> None:
    model = backbone("qwen3")
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3] = 10
        model.layers[2].self_attn.q_proj.weight[16:] *= 100
        model.embed_tokens.weight[:, 11] = 100
    found = magnitude(model)
    assert int(found.ffn_lf[1].argmax()) == 3
    assert int(found.kv_heads_lg[2].argmax()) == 1
    assert int(found.hidden_d.argmax()) == 11
    assert int(found.layers_l.argmax()) == 2


def test_pieces_hold_every_text_in_order() -> None:
    given = texts(50)
    pieces = part_scores.pieces_of(given, 100)
    assert [text.tolist() for piece in pieces for text in piece] == [text.tolist() for text in given]
    assert all(100 <= sum(map(len, piece)) < 120 for piece in pieces[:-1])


@pytest.mark.usefixtures("ray_here")
def test_the_scores_of_two_actors_are_those_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    parent = Folder.at(str(tiny_model(tmp_path / "model")))
    given = texts(40)
    monkeypatch.setattr(part_scores.pieces_of, "__defaults__", (120,))
    assert len(part_scores.pieces_of(given)) == 4
    compute = Compute(workers=2, cpus_per_worker=0.5)
    found = part_scores.score(parent, given, Prune(model="x", layers=1), compute, seed=0)
    model = load_backbone(Path(parent.path)).eval()
    whole = measure(model, given, pooling="last", tokens_per_pass=part_scores.TOKENS_PER_PASS).importance()
    for name in NAMES:
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-6, atol=1e-6)
    wanted = Prune(model="x", hidden=16, ffn=30, kv_heads=1)
    assert choose(found, wanted) == choose(whole, wanted)


def test_scores_are_read_back_and_what_is_no_score_is_refused(tmp_path: Path) -> None:
    importance = measure(backbone("llama"), texts(), pooling="last", tokens_per_pass=500).importance()
    part_scores.save(importance, tmp_path, {"texts": 30})
    for name in NAMES:
        assert torch.equal(getattr(part_scores.load(tmp_path), name), getattr(importance, name))
    (tmp_path / part_scores.TENSORS).write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"importance\.safetensors: not the scores of a model"):
        part_scores.load(tmp_path)


def test_languages_take_turns() -> None:
    groups = np.array([0] * 90 + [1] * 8 + [2] * 2)
    order = by_turns(groups, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(100))
    assert np.bincount(groups[order[:6]]).tolist() == [2, 2, 2]
    assert np.bincount(groups[order[:20]]).tolist() == [10, 8, 2]
