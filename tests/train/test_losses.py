"""The objective equals slow references written from its formulas, values and gradients, on one and two ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from f2llm_ray.data.schema import Task
from f2llm_ray.train.losses import TextPlaces, contrastive, matryoshka_weights
from f2llm_ray.train.settings import TrainStage
from tests.train.ranks import on_two_ranks

D = 24
ROWS = 6
DIMS = (8, 16, D)
PAPER = TrainStage()
OBJECTIVES: dict[str, tuple[TrainStage, Task]] = {
    "paper": (PAPER, "retrieval"),
    "hard only": (PAPER, "classification"),
    "absolute margin": (TrainStage(absolute_margin=0.1), "retrieval"),
    "absolute margin, Qwen3": (TrainStage(absolute_margin=-0.1), "retrieval"),
    "relative margin": (TrainStage(relative_margin=0.5), "retrieval"),
    "both, weighted": (
        TrainStage(absolute_margin=0.05, relative_margin=0.3, hard_negative_weight=0.3, in_batch_weight=0.7),
        "retrieval",
    ),
    "temperature of a task": (TrainStage(temperatures={"retrieval": 0.2}), "retrieval"),
    "both ways": (TrainStage(passage_to_query_weight=0.6), "retrieval"),
    "same side": (TrainStage(same_side_negatives=True), "retrieval"),
    "hardness": (TrainStage(hardness=5.0), "retrieval"),
    "everything": (
        TrainStage(passage_to_query_weight=0.5, same_side_negatives=True, hardness=2.0, relative_margin=0.1),
        "retrieval",
    ),
}
Side = tuple[torch.Tensor, TextPlaces]


def side(seed: int) -> Side:
    """One rank's batch: random vectors, with every kind of false and missing negative planted."""
    generator = torch.Generator().manual_seed(seed)
    v_nd = torch.randn(4 * ROWS, D, dtype=torch.float64, generator=generator)
    query, passage = torch.arange(ROWS), torch.arange(ROWS, 2 * ROWS)
    negative = torch.arange(2 * ROWS, 4 * ROWS).reshape(ROWS, 2)
    passage[1] = passage[0]
    query[4] = passage[3]  # a query that reads like another row's passage
    negative[0, 1] = -1
    negative[2] = -1
    negative[: seed - 1] = -1  # ranks with more and fewer rows that have negatives
    negative[3, 0] = passage[3]
    negative[4, 1] = query[4]
    v_nd[negative[5, 0]] = v_nd[passage[5]] + 0.1 * v_nd[negative[5, 0]]
    query_id = query + 1000 * seed
    query_id[5] = 1000 + passage[2]  # reads like a passage of rank 0
    query_id[2] = 1000  # the first query of rank 0, with another passage
    return v_nd, TextPlaces(query, passage, negative, passage + 1000 * seed, query_id)


@dataclass(frozen=True)
class Row:
    texts: tuple[torch.Tensor, torch.Tensor]
    """Query and passage."""
    ids: tuple[int, int]
    own: list[torch.Tensor]
    """Its hard negatives that are neither of the two."""
    brought: int
    """How many it came with."""


def rows_of(sides: list[Side]) -> list[Row]:
    rows = []
    for v_nd, place in sides:
        for row, (q, p) in enumerate(zip(place.query_b, place.passage_b, strict=True)):
            ids = int(place.query_id_b[row]), int(place.passage_id_b[row])
            there = [int(n) for n in place.negative_bk[row] if n >= 0]
            own = [v_nd[n] for n in there if n not in (int(q), int(p))]
            rows.append(Row((v_nd[q], v_nd[p]), ids, own, len(there)))
    return rows


def cosine(a: torch.Tensor, b: torch.Tensor, dim: int = D) -> torch.Tensor:
    return (a[:dim] @ b[:dim]) / (a[:dim].norm() * b[:dim].norm())


def kept(row: Row, anchor: int, negative: torch.Tensor, settings: TrainStage) -> bool:
    """Whether a text is no false negative of a row's query (0) or passage (1), by its margins."""
    of_passage, of_negative = cosine(*row.texts).item(), cosine(row.texts[anchor], negative).item()
    absolute, relative = settings.absolute_margin, settings.relative_margin
    return not (
        (absolute is not None and of_negative > of_passage - absolute)
        or (relative is not None and of_negative > of_passage - abs(of_passage) * relative)
    )


def across(rows: list[Row], row: Row, anchor: int, settings: TrainStage) -> list[torch.Tensor]:
    """In-batch negatives: texts of rows that share neither text with a row, and that read like neither."""
    strangers = [one for one in rows if one.ids[0] != row.ids[0] and one.ids[1] != row.ids[1]]
    sides = (1 - anchor, anchor) if settings.same_side_negatives else (1 - anchor,)
    texts = [one.texts[side] for side in sides for one in strangers if one.ids[side] not in row.ids]
    return [text for text in texts if kept(row, anchor, text, settings)]


def term(
    row: Row, anchor: int, negatives: list[torch.Tensor], dim: int, hardness: float, temperature: float
) -> Any:
    top = torch.exp(cosine(*row.texts, dim) / temperature)
    rest = [cosine(row.texts[anchor], n, dim) for n in negatives]
    weighted = [torch.exp(s / temperature) * math.exp(hardness * s.item()) for s in rest]
    return -torch.log(top / torch.stack([top, *weighted]).sum())


def reference(sides: list[Side], settings: TrainStage, task: Task) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The objective of the global batch, one similarity at a time."""
    rows = rows_of(sides)
    rule = settings.hardness, settings.temperatures.get(task, settings.temperature)
    weights = {"in_batch": settings.in_batch_weight, "passage_to_query": settings.passage_to_query_weight}
    total = torch.zeros((), dtype=torch.float64)
    found: dict[str, list[torch.Tensor]] = {"hard_negative": [], "in_batch": [], "passage_to_query": []}
    for order, dim in enumerate(sorted(DIMS, reverse=True), start=1):
        weight = 1 / (order * math.sqrt(D / dim))
        hard = [
            term(row, 0, [n for n in row.own if kept(row, 0, n, settings)], dim, *rule)
            for row in rows
            if row.brought
        ]
        found["hard_negative"].append(torch.stack(hard).mean())
        total = total + weight * settings.hard_negative_weight * found["hard_negative"][-1]
        for anchor, name in enumerate(weights):
            each = [term(row, anchor, across(rows, row, anchor, settings), dim, *rule) for row in rows]
            found[name].append(torch.stack(each).mean())
            if task == "retrieval":
                total = total + weight * weights[name] * found[name][-1]
    return total, {name: torch.stack(values).detach() for name, values in found.items()}


def ours(
    v_nd: torch.Tensor, places: TextPlaces, settings: TrainStage, task: Task = "retrieval"
) -> dict[str, torch.Tensor]:
    v_nd = v_nd.clone().requires_grad_()
    loss, parts = contrastive(v_nd, places, settings, task)
    loss.backward()
    assert v_nd.grad is not None
    return {"loss": loss.detach(), "gradient": v_nd.grad, **parts.by_dim}


def paper(v_nd: torch.Tensor, places: TextPlaces, dims: tuple[int, ...]) -> torch.Tensor:
    """The paper's arithmetic: every row has all its negatives, passages are gathered without gradient."""
    criterion = torch.nn.CrossEntropyLoss(reduction="none")
    ranks, me = torch.distributed.get_world_size(), torch.distributed.get_rank()
    q, p, n = v_nd[places.query_b], v_nd[places.passage_b], v_nd[places.negative_bk]
    every = [torch.empty_like(p) for _ in range(ranks)]
    torch.distributed.all_gather(every, p.detach())
    total = torch.zeros((), dtype=v_nd.dtype)
    for order, dim in enumerate(sorted(dims, reverse=True), start=1):
        query = normalize(q[:, :dim], p=2, dim=-1)
        candidates = normalize(torch.cat([p[:, None], n], dim=1)[..., :dim], p=2, dim=-1)
        logits = (query[:, None] * candidates).sum(-1) / 0.05
        hard = criterion(logits, torch.zeros(len(q), dtype=torch.long)).mean()
        logits = query @ normalize(torch.cat(every)[:, :dim], p=2, dim=-1).T / 0.05
        in_batch = criterion(logits, torch.arange(len(q)) + len(q) * me).mean()
        total = total + (hard + in_batch) / (order * math.sqrt(max(dims) / dim))
    return total


def plain_side(seed: int) -> Side:
    """A batch as the paper's code expects it: nothing missing, no text twice."""
    v_nd = torch.randn(9 * ROWS, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(9 * ROWS, generator=torch.Generator().manual_seed(seed))
    query, passage, negative = order[:ROWS], order[ROWS : 2 * ROWS], order[2 * ROWS :].reshape(ROWS, 7)
    return v_nd, TextPlaces(query, passage, negative, passage + 1000 * seed, query + 1000 * seed)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_rank_equals_the_reference(name: str) -> None:
    vectors, places = side(seed=1)
    found = ours(vectors, places, *OBJECTIVES[name])
    slow = vectors.clone().requires_grad_()
    expected, parts = reference([(slow, places)], *OBJECTIVES[name])
    expected.backward()
    close(found["loss"], expected.detach())
    close(found["gradient"], slow.grad)
    for part in found.keys() & parts.keys():
        close(found[part], parts[part])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What each of two ranks found."""
    return on_two_ranks(_rank, tmp_path_factory.mktemp("ranks"))


def _rank(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    vectors, places = side(seed=rank + 1)
    found = {name: ours(vectors, places, *objective) for name, objective in OBJECTIVES.items()}
    found["no gradient"] = ours(vectors, places, TrainStage(gather_gradient=False))
    vectors, places = plain_side(seed=rank + 1)
    found["as the paper"] = ours(vectors, places, TrainStage(gather_gradient=False))
    vectors.requires_grad_()
    loss = paper(vectors, places, DIMS)
    loss.backward()
    assert vectors.grad is not None
    found["by the paper"] = {"loss": loss.detach(), "gradient": vectors.grad}
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_ranks_equal_the_reference(name: str, two_ranks: list[dict[str, Any]]) -> None:
    """The mean over ranks is the global batch's, and gradients reach passages on the rank they came from."""
    sides = [side(seed=rank + 1) for rank in (0, 1)]
    slow = [v.clone().requires_grad_() for v, _ in sides]
    expected, parts = reference(
        [(v, places) for v, (_, places) in zip(slow, sides, strict=True)], *OBJECTIVES[name]
    )
    expected.backward()
    found = [rank[name] for rank in two_ranks]
    close((found[0]["loss"] + found[1]["loss"]) / 2, expected.detach())
    for part in found[0].keys() & parts.keys():
        close((found[0][part] + found[1][part]) / 2, parts[part])
    for rank, v in zip(found, slow, strict=True):
        # The engine averages gradients over ranks, which the reference's mean has done already.
        close(rank["gradient"] / 2, v.grad)


def test_without_gradient_through_the_gather_only_the_gradient_differs(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        close(rank["no gradient"]["loss"], rank["paper"]["loss"])
        assert not torch.allclose(rank["no gradient"]["gradient"], rank["paper"]["gradient"], atol=1e-3)


def test_equals_the_papers_arithmetic_on_two_ranks(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        close(rank["as the paper"]["loss"], rank["by the paper"]["loss"])
        close(rank["as the paper"]["gradient"], rank["by the paper"]["gradient"])


def test_parts_and_weights_make_the_loss() -> None:
    vectors, places = side(seed=1)
    loss, parts = contrastive(vectors, places, *OBJECTIVES["both, weighted"])
    weights = matryoshka_weights(DIMS)
    terms = zip(weights.values(), parts.by_dim["hard_negative"], parts.by_dim["in_batch"], strict=True)
    close(loss, sum((w * (0.3 * hard + 0.7 * across) for w, hard, across in terms), torch.tensor(0.0)))


def test_a_false_negative_moves_nothing() -> None:
    """Left out by the margin, it may be any text at all: loss and gradient of the others stay."""
    vectors, places = side(seed=1)
    near = int(places.negative_bk[5, 0])
    settings = TrainStage(absolute_margin=0.0)
    before = ours(vectors, places, settings, "classification")
    vectors[near] = vectors[places.query_b[5]]
    after = ours(vectors, places, settings, "classification")
    close(after["loss"], before["loss"])
    close(after["gradient"], before["gradient"])
    assert not after["gradient"][near].any()
    assert ours(vectors, places, PAPER, "classification")["loss"] > before["loss"] + 0.1


def test_rows_without_negatives_do_not_count() -> None:
    vectors, places = side(seed=1)
    for k in (2, 0):
        none = replace(places, negative_bk=torch.full((ROWS, k), -1))
        found = ours(vectors, none, PAPER, "classification")
        assert float(found["loss"]) == 0
        assert not found["gradient"].any()


def test_a_zero_vector_gives_no_nan() -> None:
    vectors, places = side(seed=1)
    vectors[places.query_b[0]] = 0
    found = ours(vectors.float(), places, PAPER)
    assert found["loss"].isfinite()
    assert found["gradient"].isfinite().all()


def test_float32_is_close_to_float64() -> None:
    """Also with the long common part that untrained models' vectors have."""
    vectors, places = side(seed=1)
    vectors = vectors + 10 * torch.ones(D)
    exact, found = ours(vectors, places, PAPER), ours(vectors.float(), places, PAPER)
    torch.testing.assert_close(found["loss"].double(), exact["loss"], rtol=1e-5, atol=0)


def test_matryoshka_weights_are_those_of_the_paper() -> None:
    assert matryoshka_weights([8, 16, 32]) == {32: 1.0, 16: 1 / (2 * math.sqrt(2)), 8: 1 / (3 * 2)}


def close(found: torch.Tensor, expected: torch.Tensor | None) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9, check_dtype=False)
