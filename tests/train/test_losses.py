"""The objective equals slow references written from its formulas, values and gradients, on one and two ranks."""

from __future__ import annotations

import math
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from f2llm_ray.train.losses import Places, contrastive_loss, distillation_loss, matryoshka_weights

DIMS = (8, 16, 24)
TEMPERATURE = 0.05


def batch(rows: int, seed: int) -> tuple[torch.Tensor, Places]:
    """Random vectors; rows 0 and 1 have the same passage, row 2 no negatives, row 3 two."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(4 * rows, 24, dtype=torch.float64, generator=generator)
    passage = torch.arange(rows, 2 * rows)
    passage[1] = passage[0]
    negative = torch.arange(2 * rows, 4 * rows).reshape(rows, 2)
    negative[2] = -1
    negative[0, 1] = -1
    ids = passage + 1000 * seed
    return vectors, Places(torch.arange(rows), passage, negative, ids)


def reference(vectors: list[torch.Tensor], places: list[Places], *, in_batch: bool) -> torch.Tensor:
    """Mean over ranks of the objective, one similarity at a time."""
    total = torch.zeros((), dtype=torch.float64)
    every = [
        (v[p], i)
        for v, place in zip(vectors, places, strict=True)
        for p, i in zip(place.passage_b, place.passage_id_b, strict=True)
    ]
    for number, (v, place) in enumerate(zip(vectors, places, strict=True)):
        for order, dim in enumerate(sorted(DIMS, reverse=True), start=1):
            weight = 1 / (order * math.sqrt(24 / dim))

            def sim(a: torch.Tensor, b: torch.Tensor, dim: int = dim) -> torch.Tensor:
                a, b = a[:dim], b[:dim]
                return (a @ b) / (a.norm() * b.norm()) / TEMPERATURE

            hard, across = [], []
            for row in range(len(place.query_b)):
                query, own = v[place.query_b[row]], v[place.passage_b[row]]
                positive = sim(query, own)
                negatives = [sim(query, v[n]) for n in place.negative_bk[row] if n >= 0]
                if negatives:
                    hard.append(torch.logsumexp(torch.stack([positive, *negatives]), 0) - positive)
                others = [
                    sim(query, p)
                    for at, (p, i) in enumerate(every)
                    if at != number * len(place.query_b) + row and i != place.passage_id_b[row]
                ]
                across.append(torch.logsumexp(torch.stack([positive, *others]), 0) - positive)
            total = total + weight * torch.stack(hard).mean()
            if in_batch:
                total = total + weight * torch.stack(across).mean()
    return total / len(vectors)


@pytest.mark.parametrize("in_batch", [True, False])
def test_one_rank_equals_the_reference(in_batch: bool) -> None:
    vectors, places = batch(5, seed=1)
    ours, theirs = vectors.clone().requires_grad_(), vectors.clone().requires_grad_()
    loss = contrastive_loss(ours, places, dims=DIMS, temperature=TEMPERATURE, in_batch=in_batch)
    expected = reference([theirs], [places], in_batch=in_batch)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-9)


def test_two_ranks_equal_the_reference(tmp_path: Path) -> None:
    """Gradients reach passages on the rank they came from; without the gather's gradient they do not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_two_ranks, args=(port, str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    sides = [batch(5, seed=rank + 1) for rank in (0, 1)]
    vectors = [v.clone().requires_grad_() for v, _ in sides]
    expected = reference(vectors, [places for _, places in sides], in_batch=True)
    expected.backward()
    mean = (results[0]["loss"] + results[1]["loss"]) / 2
    torch.testing.assert_close(mean, expected.detach(), rtol=0, atol=1e-9)
    for result, side in zip(results, vectors, strict=True):
        # The engine averages gradients over ranks, which the reference's mean has done already.
        torch.testing.assert_close(result["gradient"] / 2, side.grad, rtol=0, atol=1e-9)
        assert not torch.allclose(result["paper"] / 2, side.grad, atol=1e-3)
        torch.testing.assert_close(result["paper_loss"], result["loss"])


def _two_ranks(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    vectors, places = batch(5, seed=rank + 1)
    result = {}
    for gather_gradient, names in ((True, ("loss", "gradient")), (False, ("paper_loss", "paper"))):
        v = vectors.clone().requires_grad_()
        loss = contrastive_loss(
            v, places, dims=DIMS, temperature=TEMPERATURE, in_batch=True, gather_gradient=gather_gradient
        )
        loss.backward()
        result |= {names[0]: loss.detach(), names[1]: v.grad}
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_rows_without_negatives_do_not_count() -> None:
    vectors, places = batch(5, seed=3)
    none = Places(places.query_b, places.passage_b, torch.full((5, 2), -1), places.passage_id_b)
    loss = contrastive_loss(vectors, none, dims=DIMS, temperature=TEMPERATURE, in_batch=False)
    assert float(loss) == 0


def test_matryoshka_weights_are_those_of_the_paper() -> None:
    assert matryoshka_weights([8, 16, 32]) == {32: 1.0, 16: 1 / (2 * math.sqrt(2)), 8: 1 / (3 * 2)}


def test_distillation_compares_with_the_first_dims_before_normalisation() -> None:
    student, teacher = torch.randn(3, 4), torch.randn(3, 6)
    expected = ((student - teacher[:, :4]) ** 2).mean()
    torch.testing.assert_close(distillation_loss(student, teacher), expected)
