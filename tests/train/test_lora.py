"""LoRA: what is trained, what is written, and that both are as if the changes were added to the weights.

Two processes train with every kind of engine beside a reference in plain torch, without PEFT; a small run goes
through Ray Train, and again from its checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity
from torch.nn.utils import parametrize

from f2llm_ray.base.errors import DataError, RunError
from f2llm_ray.engine.encode import encode
from f2llm_ray.engine.engine import Engine
from f2llm_ray.model.checkpoint import load_backbone, load_info
from f2llm_ray.model.dense import end_in
from f2llm_ray.model.families import family_of
from f2llm_ray.model.sizes import random_backbone
from f2llm_ray.pipeline.walk import Pipeline
from f2llm_ray.recipe.files import parse
from f2llm_ray.recipe.recipe import Recipe
from f2llm_ray.run.folder import Folder
from f2llm_ray.train import checkpoints
from f2llm_ray.train.deepspeed import trained
from f2llm_ray.train.lora import ADAPTER, adapted, add_adapters, changed
from f2llm_ray.train.objective import StageLoss, Student
from f2llm_ray.train.settings import Lora, TrainStage
from tests.corpus import write_corpus
from tests.model.small import FAMILIES, backbone, texts
from tests.train.test_step import RATE, ROWS, SHAPE, SOURCES, VOCABULARY, WORLD, batch_of, batches, equal

LORA = Lora(rank=4, alpha=6)
KINDS: dict[str, dict[str, Any]] = {
    **{f"zero{zero}": {"engine": {"zero_stage": zero}} for zero in (0, 1, 2, 3)},
    "gradcache": {"engine": {"zero_stage": 2, "tokens_per_chunk": 64}},
    "checkpointing": {"engine": {"zero_stage": 3, "gradient_checkpointing": True}},
    "frozen": {"engine": {"zero_stage": 2}, "freeze_embeddings": True},
}
LEARNED = 60
"""Steps after which a model that is trained whole, and one with adapters, have both learned a batch by heart."""


def stage_of(**settings: Any) -> TrainStage:
    engine = {"precision": "fp32", "tokens_per_pass": 256, **settings.pop("engine", {})}
    return TrainStage.model_validate(
        {"global_batch": ROWS, "accumulate": 3, "clip": 1e9, "engine": engine, **settings}
    )


# The engine.


def worker(rank: int, folder: str) -> None:
    import torch.distributed

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    found = {kind: steps_of(kind, rank) for kind in KINDS}
    found["learned"] = {name: learned(lora, rank) for name, lora in (("whole", None), ("lora", {"rank": 8}))}
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    torch.distributed.destroy_process_group()


def steps_of(kind: str, rank: int) -> dict[str, Any]:
    """The steps of `test_step`, with adapters."""
    from f2llm_ray.train.deepspeed import set_learning_rate, start_engine
    from f2llm_ray.train.model_folder import gathered, gathered_trained
    from f2llm_ray.train.step import train_step
    from f2llm_ray.train.throughput import Flops

    stage = stage_of(**KINDS[kind], lora=LORA.model_dump())
    model = random_backbone(SHAPE, VOCABULARY, seed=0)
    add_adapters(model, LORA, 0, "here")
    flops = Flops(model)
    if stage.engine.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    engine = start_engine(Student(model, "last", stage.engine.tokens_per_pass), stage, WORLD)
    engine.train()
    share = ROWS // WORLD
    steps = batches(slice(rank * share, (rank + 1) * share))
    coming, seen = chain.from_iterable(steps), []
    for step in steps:
        set_learning_rate(engine, RATE)
        seen.append(
            train_step(
                engine, StageLoss(stage, SOURCES, SHAPE.hidden), coming, len(step), flops=flops, world=WORLD
            )
        )
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = sum(state["exp_avg"].numel() for state in inner.state.values())
    return {"seen": seen, "trained": gathered_trained(engine), "all": gathered(engine), "states": states}


def learned(lora: dict[str, Any] | None, rank: int) -> list[float]:
    """The losses of a model that learns a batch by heart, trained whole or with adapters."""
    from f2llm_ray.train.deepspeed import learning_rate, set_learning_rate, start_engine
    from f2llm_ray.train.step import train_step
    from f2llm_ray.train.throughput import Flops

    # At this temperature the loss has a floor well above 0, which both can reach.
    settings = {"accumulate": 1, "temperature": 1.0, "warmup_steps": 5, "lr": RATE}
    stage = stage_of(**settings, lora=lora)
    model = random_backbone(SHAPE, VOCABULARY, seed=0)
    if stage.lora is not None:
        add_adapters(model, stage.lora, 0, "here")
    flops, share = Flops(model), ROWS // WORLD
    engine = start_engine(Student(model, "last", stage.engine.tokens_per_pass), stage, WORLD)
    engine.train()
    found = []
    for step in range(LEARNED):
        set_learning_rate(engine, learning_rate(stage, step, LEARNED))
        batch = batch_of(0, "pairs", slice(rank * share, (rank + 1) * share))
        loss = StageLoss(stage, SOURCES, SHAPE.hidden)
        found.append(train_step(engine, loss, iter([batch]), 1, flops=flops, world=WORLD).values["loss"])
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lora")
    mp.spawn(worker, args=(str(folder),), nprocs=WORLD)
    whole: dict[str, Any] = torch.load(folder / "found.pt", weights_only=False)
    return whole


class Sum(torch.nn.Module):
    """A weight as W + scale * B A, by torch's own parametrization."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(value.detach().clone()) for value in (a, b))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 6 / 4 * (self.b @ self.a)


@pytest.fixture(scope="module")
def by_hand() -> dict[str, Any]:
    """The steps in one process, without PEFT, from the same first A."""
    twin, model = (random_backbone(SHAPE, VOCABULARY, seed=0) for _ in range(2))
    add_adapters(twin, LORA, 0, "here")
    model.requires_grad_(False)
    first, pairs = twin.state_dict(), {}
    for name in adapted(LORA, family_of(model.config), SHAPE.layers, "here"):
        a, b = (first[f"{name}.lora_{part}.default.weight"] for part in "AB")
        assert a.any()
        assert not b.any()
        pairs[name] = Sum(a, b)
        parametrize.register_parametrization(model.get_submodule(name), "weight", pairs[name])
    stage = stage_of()
    loss = StageLoss(stage, SOURCES, SHAPE.hidden)
    moved = {
        f"{name}.lora_{part.upper()}.default.weight": getattr(pair, part)
        for name, pair in pairs.items()
        for part in "ab"
    }
    optimizer = torch.optim.AdamW(moved.values(), lr=RATE, betas=stage.betas, weight_decay=stage.weight_decay)
    norms, losses = [], []
    for step in batches(slice(None)):
        optimizer.zero_grad()
        for batch in step:
            value = loss(encode(model, batch.tokens, pooling="last", tokens_per_pass=4096), batch)[0]
            (value / len(step)).backward()
            losses.append(value.item())
        gradients = [value.grad for value in moved.values() if value.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        optimizer.step()
    weights = {name: value.detach() for name, value in moved.items()}
    return {"norms": norms, "losses": losses, "weights": weights}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_added_changes(found: dict[str, Any], by_hand: dict[str, Any], kind: str) -> None:
    assert found[kind]["trained"].keys() == by_hand["weights"].keys()
    equal({**found[kind], "weights": found[kind]["trained"]}, by_hand)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapters_move_and_have_moments(found: dict[str, Any], kind: str) -> None:
    before = random_backbone(SHAPE, VOCABULARY, seed=0).state_dict()
    after = {name.replace(".base_layer", ""): value for name, value in found[kind]["all"].items()}
    assert after.keys() == before.keys() | found[kind]["trained"].keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    count = sum(value.numel() for value in found[kind]["trained"].values())
    share = count if kind == "zero0" else count / WORLD
    assert share <= found[kind]["states"] <= share * 1.01 + 64, "DeepSpeed fills up the shares"


def test_both_ways_of_training_learn_the_same(found: dict[str, Any]) -> None:
    whole, lora = (np.array(found["learned"][name]) for name in ("whole", "lora"))
    assert whole[0] == pytest.approx(lora[0], rel=1e-6), "B is 0 at the start"
    assert max(whole[-1], lora[-1]) < 0.6 * whole[0]
    assert lora[-1] == pytest.approx(whole[-1], rel=0.05)


# The model.


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_linear_is_every_linear_module_and_a_merged_model_is_the_adapted_one(kind: str) -> None:
    plain, model = backbone(kind), backbone(kind)
    linear = [name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)]
    end_in(model, 12, "here")
    add_adapters(model, LORA, 0, "here")
    moved = {name: value.detach() for name, value in trained(model)}
    assert set(moved) == {
        *(f"{name}.lora_{part}.default.weight" for name in linear for part in "AB"),
        "dense.weight",
        "dense.bias",
    }
    generator = torch.Generator().manual_seed(0)
    for name, value in moved.items():
        value.add_(torch.randn(value.shape, generator=generator), alpha=0.1 if "lora" in name else 0)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    merged = {name: changed(name, value, LORA, moved.get) for name, value in before.items()}
    assert {name for name in merged if not torch.equal(merged[name], before[name])} == {
        f"{name}.weight" for name in linear
    }
    own = vectors(model, 12)
    plain.load_state_dict(merged)
    end_in(plain, 12, "here")
    assert float((1 - cosine_similarity(vectors(plain, 12), own)).max()) < 1e-5
    plain.load_state_dict({**plain.state_dict(), **before})
    assert float((1 - cosine_similarity(vectors(plain, 12), own)).max()) > 1e-3, "the changes are seen"


def vectors(model: Any, dims: int) -> torch.Tensor:
    with torch.no_grad():
        found = encode(model.eval(), texts(), pooling="mean", tokens_per_pass=256)
    assert found.shape[1] == dims
    return found


def test_the_first_adapters_depend_on_the_seed_alone() -> None:
    def first(seed: int, drawn: int) -> dict[str, torch.Tensor]:
        model = backbone("qwen3")
        torch.manual_seed(drawn)
        add_adapters(model, LORA, seed, "here")
        assert torch.initial_seed() == drawn
        return {name: value for name, value in model.state_dict().items() if "lora_A" in name}

    one, same, other = first(0, 1), first(0, 2), first(1, 1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_targets_are_ends_of_names() -> None:
    family = family_of(backbone("qwen3").config)
    for targets, names in (
        (("q_proj",), [f"layers.{layer}.self_attn.q_proj" for layer in (0, 1)]),
        (("1.mlp.up_proj", "layers.0.mlp.gate_proj"), ["layers.0.mlp.gate_proj", "layers.1.mlp.up_proj"]),
    ):
        assert sorted(adapted(Lora(targets=targets), family, 2, "here")) == names
    for wrong in ("proj", "k_proj ", "dense", "2.mlp.up_proj"):
        with pytest.raises(
            RunError, match=rf"here: lora.targets: found '{wrong}', .* of the model ends in; .* self_attn.q_proj, "
        ):
            adapted(Lora(targets=("q_proj", wrong)), family, 2, "here")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"targets": []}, "targets"),
        ({"targets": "q_proj"}, "targets"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_what_cannot_be_is_refused_in_the_recipe(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainStage.model_validate({"lora": said})
    with pytest.raises(ValidationError, match=r"lora: was not tried with engine.compile; leave one out"):
        TrainStage.model_validate({"lora": {}, "engine": {"compile": True}})


def test_a_map_to_the_teachers_dims_is_trained_whole() -> None:
    model = backbone("qwen3")
    add_adapters(model, LORA, 0, "here")
    names = [name for name, _ in trained(Student(model, "last", 256, projected_dims=8))]
    assert "projection.weight" in names
    assert all(".lora_" in name for name in names if name != "projection.weight")


def test_alpha_is_twice_the_rank_where_it_is_unset() -> None:
    assert (Lora().scale, Lora(rank=4).scale, Lora(rank=4, alpha=4).scale) == (2, 2, 1)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DataError, match=r"^package 'peft' is not installed; get it with: .*f2llm-ray\[lora\]'$"):
        add_adapters(backbone("qwen3"), LORA, 0, "here")


# Through Ray Train.


@dataclass(frozen=True)
class Made:
    """A finished run."""

    recipe: Recipe
    root: Path

    def stage(self, name: str) -> Path:
        (found,) = self.root.glob(f"{name}-[0-9a-f]*")
        return found

    def model(self, name: str) -> Path:
        return self.stage(name) / "model"

    def checkpoint(self, name: str, step: int) -> checkpoints.Checkpoint:
        found = {each.step: each for each in checkpoints.listed(Folder.at(str(self.stage(name) / "ray_train")))}
        return found[step]


def recipe_of(folder: Path) -> Recipe:
    """A stage with all that LoRA has to get on with, and a distillation into its model's space."""
    given = write_corpus(folder, rows=120)
    for name in ("labels", "clusters"):
        del given["sources"][name]
    training = {**given["stages"]["stage1"], "negatives": {}, "checkpoint_every": 2, "max_steps": 4}
    engine = training["engine"]
    given["stages"] = {
        "adapters": {
            **training,
            "lr": 2e-2,
            "lora": LORA.model_dump(),
            "freeze_embeddings": True,
            "elastic": {"layers": [1]},
            "merge": {"last": 2},
            "engine": {**engine, "tokens_per_chunk": 256, "gradient_checkpointing": True},
        },
        "smaller": {"kind": "prune", "model": "adapters", "hidden": 16, "calibration_rows": 20},
        "taught": {
            **training,
            "kind": "distill",
            "teacher": "adapters",
            "teacher_vectors": "online",
            "space": "teacher",
            "keep_best": True,
            "lora": {"rank": 2, "targets": ["q_proj", "mlp.down_proj"]},
            "engine": {**engine, "zero_stage": 3},
        },
    }
    del given["prune"], given["distill"]
    given["evaluation"]["during_training"] = True
    return parse(Recipe, given, "r")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Made:
    del ray_here
    folder = tmp_path_factory.mktemp("run")
    recipe = recipe_of(folder)
    Pipeline(recipe, str(folder / "root")).everything()
    return Made(recipe, folder / "root")


def tokens_of(folder: Path) -> Any:
    return Engine(folder).tokenize(["balan kovor", "mizik", "tupem redus sahox balan"])


@pytest.mark.timeout(900)
def test_the_model_is_a_plain_one_with_the_changes_added(made: Made) -> None:
    from peft import PeftModel

    before, after = (load_file(made.model(name) / "model.safetensors") for name in ("untrained", "adapters"))
    assert before.keys() == after.keys()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "proj" in name}
    assert load_info(made.model("adapters")).exits == (1,)
    tokens = tokens_of(made.model("adapters"))
    merged = load_backbone(made.model("adapters")).eval()
    # The adapter, as PEFT reads it, over the model that training began from.
    adapter = PeftModel.from_pretrained(load_backbone(made.model("untrained")), made.stage("adapters") / ADAPTER)
    own, plain, peft = (
        encode(model.eval(), tokens, pooling="last", tokens_per_pass=256).detach()
        for model in (merged, load_backbone(made.model("untrained")), adapter.get_base_model())
    )
    assert float(cosine_similarity(own, peft).min()) >= 0.9999
    torch.testing.assert_close(own, peft, rtol=0, atol=1e-4)
    assert float(cosine_similarity(plain, peft).max()) < 0.9999
    said = json.loads((made.stage("adapters") / ADAPTER / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["peft_type"]) == (4, 6, "LORA")
    assert said["target_modules"] == sorted(said["target_modules"])


@pytest.mark.timeout(900)
def test_checkpoints_are_of_adapters_and_are_measured_and_merged(made: Made) -> None:
    saved = made.checkpoint("adapters", 2)
    parts = [load_file(part) for part in Path(saved.folder.path).glob("*.safetensors")]
    names = {name for part in parts for name in part if not name.startswith("random/")}
    assert names
    assert all(".lora_" in name for name in names)
    before, after, merged = (
        load_file(made.model(name) / "model.safetensors") for name in ("untrained", "adapters", "adapters-merged")
    )
    with checkpoints.weights(saved, LORA) as read:
        for name, value in before.items():
            at_two = read(name, value)
            assert torch.equal(at_two, value) == ("proj" not in name)
            torch.testing.assert_close(merged[name], (at_two + after[name]) / 2, rtol=0, atol=1e-7)
    scores = json.loads((made.stage("adapters") / "checkpoint_scores.json").read_text())
    assert [step for step, _ in scores["ndcg@10 on held"]] == [2]


@pytest.mark.timeout(900)
def test_a_distillation_trains_its_map_whole_and_exports_the_best(made: Made) -> None:
    training = json.loads((made.stage("taught") / "training.json").read_text())
    before, after = (load_backbone(made.model(name)).state_dict() for name in ("smaller", "taught"))
    moved = {name for name, value in after.items() if name not in before or not torch.equal(value, before[name])}
    linear = {name for name in before if name.endswith(("q_proj.weight", "down_proj.weight"))}
    assert moved == linear | {"dense.weight", "dense.bias"}
    assert not torch.equal(after["dense.weight"], torch.eye(32, 16))
    losses = dict(training["validation"])
    assert training["exported_step"] == min(losses, key=losses.__getitem__)
    assert load_info(made.model("taught")).dims == (8, 16, 32)
    assert Engine(made.model("taught")).embed(["balan"]).shape == (1, 32)


@pytest.mark.timeout(900)
def test_going_on_from_a_checkpoint_equals_never_having_stopped(
    made: Made, capfd: pytest.CaptureFixture[str]
) -> None:
    root = made.root.parent / "again"
    written = shutil.ignore_patterns("manifest.json", "training.json", "model", ADAPTER)
    for name in ("prepare", "untrained", "set-held", "overlap-held"):
        for stage in made.root.glob(f"{name}-[0-9a-f]*"):
            shutil.copytree(stage, root / stage.name)
    left = shutil.copytree(made.stage("adapters"), root / made.stage("adapters").name, ignore=written)
    assert not (left / "model").exists()
    Pipeline(made.recipe, str(root)).model("adapters")
    assert "adapters: goes on from step 2" in "".join(capfd.readouterr())
    for name in (
        "model/model.safetensors",
        f"{ADAPTER}/adapter_model.safetensors",
        f"{ADAPTER}/adapter_config.json",
    ):
        assert (left / name).read_bytes() == (made.stage("adapters") / name).read_bytes(), name
    losses = [
        json.loads((stage / "training.json").read_text())["loss"] for stage in (left, made.stage("adapters"))
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
