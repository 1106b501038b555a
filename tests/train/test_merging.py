"""Merging a stage: its model and the checkpoints before it, whatever the number of workers that wrote them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.tokens.store import tokenize
from f2llm_ray.data.tokens.tokenizer import load_tokenizer
from f2llm_ray.engine.encode import encode
from f2llm_ray.model.checkpoint import load_backbone, load_info
from f2llm_ray.model.merge import slerp
from f2llm_ray.model.settings import Soup
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.merge_checkpoints import merge_stage
from f2llm_ray.train.merge_models import merge_models
from f2llm_ray.train.model_folder import write_reweighted
from f2llm_ray.train.settings import Merge, TrainStage
from tests.encoders import encoder_folder
from tests.tiny import LINES, tiny_model

STEPS = 30


def write_checkpoint(stage: Path, step: int, state: dict[str, torch.Tensor], world: int) -> Path:
    """A checkpoint as `world` workers write it."""
    folder = stage / "ray_train" / f"checkpoint_{step:06d}"
    folder.mkdir(parents=True)
    for rank in range(world):
        own = {f"weight/backbone.{name}": state[name].contiguous() for name in sorted(state)[rank::world]}
        part = folder / f"part-{rank:05d}-of-{world:05d}"
        save_file({**own, "random/cpu": torch.get_rng_state()}, f"{part}.safetensors")
        content = Path(f"{part}.safetensors").read_bytes()
        seal = {"step": step, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "history": {}}
        Path(f"{part}.json").write_text(json.dumps(seal))
    return folder


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A finished stage whose weights grow by a tenth from checkpoint to checkpoint."""
    model = tiny_model(tmp_path / "stage" / "model")
    state = load_file(model / "model.safetensors")
    for step, scale, world in ((10, 0.8, 1), (20, 0.9, 2)):
        write_checkpoint(tmp_path / "stage", step, {name: scale * value for name, value in state.items()}, world)
    (tmp_path / "stage" / "training.json").write_text(json.dumps({"steps": STEPS}))
    return tmp_path / "stage"


def merge(stage: Path, settings: Merge) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    out = stage.parent / f"merged-{settings.last}"
    facts = merge_stage(settings, Folder.at(str(stage)), "tiny-merged", Folder.at(str(out)), checkpoint_every=10)
    return load_file(out / "model" / "model.safetensors"), facts


def test_the_last_ones_are_averaged(stage: Path) -> None:
    last = load_file(stage / "model" / "model.safetensors")
    for count, scale in ((2, 0.95), (3, 0.9)):
        merged, facts = merge(stage, Merge(last=count))
        assert facts == {"merging": {"method": "average", "steps": [10, 20, 30][-count:]}}
        assert merged.keys() == last.keys()
        for name, value in merged.items():
            torch.testing.assert_close(value, scale * last[name], rtol=1e-6, atol=0)


def test_an_arc_between_two(stage: Path) -> None:
    last = load_file(stage / "model" / "model.safetensors")
    merged, facts = merge(stage, Merge(last=2, method="slerp"))
    assert facts["merging"] == {"method": "slerp", "steps": [20, 30]}
    for name, value in merged.items():  # of one direction: the line
        torch.testing.assert_close(value, 0.95 * last[name], rtol=1e-5, atol=1e-9)


def test_equal_checkpoints_merge_to_the_model_bit_for_bit(stage: Path) -> None:
    last = load_file(stage / "model" / "model.safetensors")
    shutil.rmtree(stage / "ray_train")
    for step in (10, 20):
        write_checkpoint(stage, step, last, 3)
    merged, _ = merge(stage, Merge(last=3))
    assert all(torch.equal(value, last[name]) for name, value in merged.items())
    folders = (stage / "model", stage.parent / "merged-3" / "model")
    assert [load_info(folder).name for folder in folders] == ["tiny", "tiny-merged"]
    vectors = [
        encode(
            load_backbone(folder).eval(),
            tokenize(load_tokenizer(folder), LINES, None),
            pooling="last",
            tokens_per_pass=256,
        )
        for folder in folders
    ]
    assert torch.equal(*vectors)


@pytest.mark.parametrize("method", ["average", "slerp"])
def test_weights_that_training_left_alone_stay(stage: Path, method: Literal["average", "slerp"]) -> None:
    last = load_file(stage / "model" / "model.safetensors")
    trained = {name: value for name, value in last.items() if name != "embed_tokens.weight"}
    shutil.rmtree(stage / "ray_train")
    write_checkpoint(stage, 20, {name: 0.9 * value for name, value in trained.items()}, 2)
    merged, _ = merge(stage, Merge(last=2, method=method))
    assert torch.equal(merged["embed_tokens.weight"], last["embed_tokens.weight"])
    assert not torch.equal(merged["norm.weight"], last["norm.weight"])


def test_only_the_checkpoints_at_the_last_multiples_are_merged(stage: Path) -> None:
    """Not one that is left of another checkpoint_every, nor an earlier one in place of one that is missing."""
    last = load_file(stage / "model" / "model.safetensors")
    for step in (25, 15):
        write_checkpoint(stage, step, {name: 7 * value for name, value in last.items()}, 1)
    merged, facts = merge(stage, Merge(last=3))
    assert facts["merging"] == {"method": "average", "steps": [10, 20, 30]}
    for name, value in merged.items():
        torch.testing.assert_close(value, 0.9 * last[name], rtol=1e-6, atol=0)
    shutil.rmtree(stage / "ray_train" / "checkpoint_000020")
    with pytest.raises(RunError, match=r"checkpoints of steps \[10, 15, 25\]; 1 are needed, .* steps \[20\]"):
        merge(stage, Merge(last=2))


def test_too_few_or_damaged_checkpoints_are_told(stage: Path) -> None:
    with pytest.raises(RunError, match=r"merge.last is 4, but .* step 30 .* steps \[10, 20\]"):
        merge(stage, Merge(last=4))
    part = stage / "ray_train" / "checkpoint_000020" / "part-00001-of-00002.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(RunError, match=r"checkpoint of step 20 is damaged: part-00001.* is not what was written"):
        merge(stage, Merge(last=2))


def test_what_cannot_be_merged_is_refused_in_the_recipe() -> None:
    with pytest.raises(ValueError, match="keep_best"):
        TrainStage(merge=Merge(last=2), keep_best=True)
    with pytest.raises(ValueError, match="need keep_checkpoints 3 or more; it is 2"):
        TrainStage(merge=Merge(last=4))
    with pytest.raises(ValueError, match="slerp is between 2"):
        Merge(method="slerp")


# Several finished models.


def scaled(model: Path, folder: Path, scale: float) -> Path:
    """A copy of a model whose weights are larger."""
    write_reweighted(model, folder, load_info(model), lambda _, value: scale * value)
    return folder


def souped(folder: Path, models: list[Path], **settings: Any) -> tuple[Path, dict[str, Any]]:
    soup = Soup(models=tuple(map(str, models)), **settings)
    out = folder / "soup"
    facts = merge_models(soup, [Folder.at(str(model)) for model in models], "soup", Folder.at(str(out)))
    return out / "model", facts["merging"]


def test_models_are_averaged_by_their_shares(tmp_path: Path) -> None:
    one = tiny_model(tmp_path / "one")
    models = [one, scaled(one, tmp_path / "two", 2.0), scaled(one, tmp_path / "three", 4.0)]
    merged, facts = souped(tmp_path, models, weights=(1, 2, 1))
    assert list(facts["shares"].values()) == [0.25, 0.5, 0.25]
    weights = load_file(one / "model.safetensors")
    for name, value in load_file(merged / "model.safetensors").items():
        torch.testing.assert_close(value, 2.25 * weights[name])
    assert load_info(merged).name == "soup"
    same, _ = souped(tmp_path / "same", [one, one, one])
    assert (same / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()


def test_two_models_meet_on_the_arc(tmp_path: Path) -> None:
    one, other = tiny_model(tmp_path / "one"), tmp_path / "other"
    generator = torch.Generator().manual_seed(0)
    noise = lambda _, value: value + torch.randn(value.shape, generator=generator)  # noqa: E731
    write_reweighted(one, other, load_info(one), noise)
    merged, _ = souped(tmp_path, [one, other], weights=(3, 1), method="slerp")
    first, second = (load_file(model / "model.safetensors") for model in (one, other))
    for name, value in load_file(merged / "model.safetensors").items():
        torch.testing.assert_close(value, slerp(first[name], second[name], 0.25))


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    one = tiny_model(tmp_path / "one")
    with pytest.raises(RunError, match=r"wide: dims is \(8, 16, 32, 64\), expected \(8, 16, 32\) as in .*one"):
        souped(tmp_path, [one, tiny_model(tmp_path / "wide", hidden=64)])
    encoder = encoder_folder(tmp_path / "encoder", "bert")
    with pytest.raises(RunError, match=r"encoder: dims is \(32,\), expected \(8, 16, 32\)"):
        souped(tmp_path, [one, encoder])
    with pytest.raises(RunError, match=r"roberta/tokenizer\.json: differs from that of .*encoder in added_tokens"):
        souped(tmp_path, [encoder, encoder_folder(tmp_path / "roberta", "xlm-roberta")])
    deep = encoder_folder(tmp_path / "deep", "bert", layers=3)
    shutil.copy(encoder / "tokenizer.json", deep)  # two trainings of one may differ
    with pytest.raises(RunError, match=r"encoder: weight \S+: found (none|\[.*), expected \[.* as in .*deep"):
        souped(tmp_path, [deep, encoder])
    for wrong, message in (
        ({"weights": (1.0,)}, "found 1, expected one for each of 2 models"),
        ({"models": ("a", "b", "c"), "method": "slerp"}, "slerp is between 2 models"),
    ):
        with pytest.raises(ValidationError, match=message):
            Soup(**{"models": ("a", "b"), **wrong})
