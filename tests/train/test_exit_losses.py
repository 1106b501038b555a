"""The loss of a model with exits is the mean of those of its first layers, taken as models of their own.

The slow reference cuts the model for each exit, encodes one text at a time, and takes one similarity at a time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.schema import SourceFacts
from f2llm_ray.engine.encode import encode, passes_of
from f2llm_ray.engine.settings import Compute
from f2llm_ray.model.prune import first_layers
from f2llm_ray.model.sizes import Shape, random_backbone
from f2llm_ray.run.folder import Folder
from f2llm_ray.train.gradcache import cached_backward
from f2llm_ray.train.loader import TrainBatch
from f2llm_ray.train.objective import StageLoss, Student
from f2llm_ray.train.settings import Distill, Elastic, TrainStage
from f2llm_ray.train.teacher import TeacherVectors
from f2llm_ray.train.training import Training, check_exits
from tests.tiny import tiny_model
from tests.train import test_losses, test_terms
from tests.train.ranks import on_two_ranks

D, WIDE = test_losses.D, test_terms.WIDE
SHAPE = Shape(hidden=D, layers=4, heads=3, kv_heads=3, head_dim=8, ffn=48)
VOCABULARY, BUDGET = 60, 80
ELASTIC = {"layers": (1, 3)}
SOURCES = {"pairs": SourceFacts("retrieval", "")}
TERMS = {
    "mse_weight": 0.5,
    "cosine_weight": 0.3,
    "similarity_weight": 0.2,
    "similarity_temperature": 0.1,
    "margin_weight": 0.4,
    "spread_weight": 0.6,
}
STAGES = {
    "contrastive": TrainStage(elastic=ELASTIC, passage_to_query_weight=0.4, relative_margin=0.3),
    "taught": Distill(elastic=ELASTIC, teacher="teacher", **TERMS),
    "projected": Distill(elastic=ELASTIC, teacher="teacher", projection=True, **TERMS),
}
WAYS = ("direct", "cached")


def batch_of(seed: int) -> TrainBatch:
    """One rank's batch, with every kind of false and missing negative (`test_losses.side`)."""
    places, generator = test_losses.side(seed)[1], np.random.default_rng(seed)
    count = 4 * test_losses.ROWS
    lengths = generator.integers(2, 20, count)
    return TrainBatch(
        step=0,
        source="pairs",
        tokens=[generator.integers(0, VOCABULARY, length).astype(np.uint32) for length in lengths],
        query=places.query_b.numpy(),
        passage=places.passage_b.numpy(),
        negative=places.negative_bk.numpy(),
        passage_id=places.passage_id_b.numpy(),
        query_id=places.query_id_b.numpy(),
        teacher=generator.normal(size=(count, WIDE)).astype(np.float16),
    )


class ExactTeacher(TeacherVectors):
    """A cached teacher whose vectors are taken in float64."""

    def __call__(self, batch: TrainBatch) -> torch.Tensor:
        return super().__call__(batch).double()


def loss_of(stage: TrainStage) -> StageLoss:
    teacher = ExactTeacher(WIDE) if isinstance(stage, Distill) else None
    return StageLoss(stage, SOURCES, D, teacher)


def exact(model: torch.nn.Module) -> torch.nn.Module:
    """The model with norms in float64: those of its class go through float32, and gradients with them."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Qwen3RMSNorm":
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model.double()


def student_of(stage: TrainStage) -> Student:
    backbone = exact(random_backbone(SHAPE, VOCABULARY, seed=0))
    student = Student(backbone, "last", BUDGET, None, loss_of(stage).projected_dims, stage.exits)
    if student.projection is not None:
        with torch.no_grad():
            student.projection.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    return student.double()


def ours(stage: TrainStage, seed: int, way: str) -> dict[str, Any]:
    """Loss, parts and gradients of one rank, in one chunk or by GradCache."""
    student, loss, batch = student_of(stage), loss_of(stage), batch_of(seed)
    chunks = [list(range(len(batch.tokens)))]
    if way == "cached":
        chunks = passes_of(student.backbone, batch.tokens, 40)
        assert len(chunks) > 2
    value, parts = cached_backward(
        lambda chunk: student([batch.tokens[place] for place in chunk]),
        chunks,
        lambda v: loss(v, batch),
        lambda scalar, _: scalar.backward(),
    )
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {"loss": value, "gradients": gradients, "by_exit": dict(parts.by_exit), "terms": dict(parts.terms)}


@cache
def reference(name: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Mean loss and gradients of the models that the exits are, over all ranks' rows."""
    stage = STAGES[name]
    student = student_of(stage)
    whole, weight = student.backbone, None if student.projection is None else student.projection.weight
    losses, gradients = [], dict[str, torch.Tensor]()
    for layers in (*stage.exits, SHAPE.layers):
        model, sides, taught = exact(first_layers(whole, layers)), [], []
        for batch in map(batch_of, seeds):
            v_nd = torch.cat([encode(model, [t], pooling="last", tokens_per_pass=9) for t in batch.tokens])
            places = test_losses.side(seeds[len(sides)])[1]
            sides.append((v_nd, places))
            assert batch.teacher is not None
            matched = v_nd if weight is None else v_nd @ weight.T
            taught.append((v_nd, matched, torch.from_numpy(batch.teacher.astype(np.float64)), places))
        total = test_losses.reference(sides, stage, "retrieval")[0]
        if isinstance(stage, Distill):
            total = total + test_terms.reference(taught, stage)[0]
        total.backward()
        losses.append(total.detach())
        for weight_name, parameter in model.named_parameters():
            if parameter.grad is not None:
                key = f"backbone.{weight_name}"
                gradients[key] = gradients.get(key, torch.zeros_like(parameter)) + parameter.grad / 3
    if weight is not None and weight.grad is not None:
        gradients["projection.weight"] = weight.grad / 3
    return {"loss": torch.stack(losses).mean(), "gradients": gradients, "losses": losses}


def equal(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """The mean over ranks is the reference: of losses, and of gradients as the engine takes it."""
    world = len(found)
    test_losses.close(sum(rank["loss"] for rank in found) / world, expected["loss"])
    for place, layers in enumerate(ELASTIC["layers"]):
        test_losses.close(sum(rank["by_exit"][layers] for rank in found) / world, expected["losses"][place])
    assert found[0]["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        mean = sum(rank["gradients"][name] for rank in found) / world
        torch.testing.assert_close(mean, gradient, rtol=0, atol=1e-9, msg=lambda why, n=name: f"{n}: {why}")
    assert min(float(g.abs().max()) for g in expected["gradients"].values()) > 1e-4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STAGES)
def test_one_rank_equals_models_of_their_own(name: str, way: str) -> None:
    equal([ours(STAGES[name], 1, way)], reference(name, (1,)))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(_rank, tmp_path_factory.mktemp("ranks"))


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {f"{name} {way}": ours(stage, rank + 1, way) for name, stage in STAGES.items() for way in WAYS}
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_equal_models_of_their_own(name: str, way: str, two_ranks: list[dict[str, Any]]) -> None:
    equal([rank[f"{name} {way}"] for rank in two_ranks], reference(name, (1, 2)))


@pytest.mark.parametrize("name", STAGES)
def test_the_last_layer_alone_is_a_stage_without_exits_bit_for_bit(name: str) -> None:
    alone = STAGES[name].model_copy(update={"elastic": Elastic(layers=())})
    without = STAGES[name].model_copy(update={"elastic": None})
    (found, expected) = (ours(stage, 1, "direct") for stage in (alone, without))
    assert torch.equal(found["loss"], expected["loss"])
    assert found["gradients"].keys() == expected["gradients"].keys()
    assert all(torch.equal(g, expected["gradients"][name]) for name, g in found["gradients"].items())
    assert found["by_exit"] == {}


def test_exits_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for wrong in ((2, 1), (1, 1)):
        with pytest.raises(ValidationError, match="expected different numbers that rise"):
            Elastic(layers=wrong)
    student = Folder.at(str(tiny_model(tmp_path / "tiny")))
    training = Training(
        stage="stage1",
        model_name="a-stage1",
        run_name="a",
        settings=TrainStage(elastic={"layers": [1, 2]}),
        sources=SOURCES,
        seed=0,
        compute=Compute(),
    )
    with pytest.raises(
        RunError, match=r"stage 'stage1': elastic.layers: found \[1, 2\], expected numbers below 2"
    ):
        check_exits(training, student)
    check_exits(replace(training, settings=TrainStage(elastic={"layers": [1]})), student)
