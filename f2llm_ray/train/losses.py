"""The contrastive objective and its matryoshka weights, as pure functions.

Shapes: b rows of this rank, B rows of all ranks, k negatives, n texts, d hidden size, m matryoshka dims (largest
first). `q_bd` queries, `p_bd` passages, `n_bkd` negatives. Cosines go over a temperature (paper: 0.05).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy

from f2llm_ray.data.schema import Task
from f2llm_ray.model.checkpoint import matryoshka_dims
from f2llm_ray.train.settings import TrainStage


@dataclass(frozen=True)
class TextPlaces:
    """The role of each vector in a rank's batch: the places and ids of `train.loader.TrainBatch` as tensors."""

    query_b: torch.Tensor
    passage_b: torch.Tensor
    negative_bk: torch.Tensor
    """-1 where a row has fewer negatives."""
    passage_id_b: torch.Tensor
    query_id_b: torch.Tensor
    """Ids like those of passages: a passage that reads like a row's query is no negative of that row."""


@dataclass(frozen=True)
class Parts:
    """The terms of a loss, for the log: detached and unweighted; means over ranks are the global batch's."""

    hard_negative_m: torch.Tensor
    """The hard-negative term of each dim."""
    in_batch_m: torch.Tensor | None
    """The in-batch term of each dim; None in a batch without it."""
    terms: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The further terms by name (train/terms.py)."""

    @property
    def total_m(self) -> torch.Tensor:
        """Both terms of each dim."""
        return self.hard_negative_m if self.in_batch_m is None else self.hard_negative_m + self.in_batch_m


def matryoshka_weights(dims: Sequence[int]) -> dict[int, float]:
    """Weight of each dim: the i-th largest has 1 / (i * sqrt(d / dim)), i from 1 (paper's public code)."""
    largest_first = sorted(dims, reverse=True)
    full = largest_first[0]
    return {dim: 1 / (i * math.sqrt(full / dim)) for i, dim in enumerate(largest_first, start=1)}


def contrastive(
    v_nd: torch.Tensor, places: TextPlaces, settings: TrainStage, task: Task
) -> tuple[torch.Tensor, Parts]:
    """The paper's objective: hard-negative and, for retrieval, in-batch term, summed over the matryoshka dims.

    The mean over ranks is the loss of the global batch, however its rows are dealt out. Every rank must have
    as many rows.

    Which negatives are false is decided once, by the cosines of all dims: it is a fact about two texts, which the
    most dims know best. By the cosines of 8 dims alone, in which unrelated texts differ by 0.35 from chance, the
    smallest dims would excuse the very mistakes that they are trained to lose.

    Args:
        v_nd: vectors of the rank's distinct texts, before normalisation, in float32 or float64.
        places: the role of each of them.
        settings: the stage's temperatures, weights, margins and smallest matryoshka dim.
        task: the task of the batch's source.

    Returns:
        The loss of this rank, and its parts.
    """
    q_bd, p_bd = v_nd[places.query_b], v_nd[places.passage_b]
    n_bkd = v_nd[places.negative_bk.clamp(min=0)]
    weights = matryoshka_weights(matryoshka_dims(v_nd.shape[1], settings.matryoshka_min_dim))
    dims, temperature = list(weights), settings.temperatures.get(task, settings.temperature)
    positive_mb = [positive_b1[:, 0] for positive_b1 in _cosines(q_bd, p_bd[:, None], dims)]
    negative_mbk = _cosines(q_bd, n_bkd, dims)

    has_bk = places.negative_bk >= 0
    own_bk = (places.negative_bk == places.passage_b[:, None]) | (places.negative_bk == places.query_b[:, None])
    margins = (settings.absolute_margin, settings.relative_margin)
    keep_bk = has_bk & ~own_bk & ~too_close(negative_mbk[0], positive_mb[0], *margins)
    rows = per_rank(has_bk.any(1), v_nd.dtype)
    hard_m = torch.stack(
        [
            hard_negative_loss(positive_b, negative_bk, keep_bk, temperature).sum() / rows
            for positive_b, negative_bk in zip(positive_mb, negative_mbk, strict=True)
        ]
    )
    weight_m = torch.tensor(list(weights.values()), dtype=hard_m.dtype, device=hard_m.device)
    loss = settings.hard_negative_weight * (weight_m @ hard_m)
    if task != "retrieval":
        return loss, Parts(hard_m.detach(), None)

    p_Bd = gather(p_bd) if settings.gather_gradient else gather(p_bd.detach())
    across_mbB = _cosines(q_bd, p_Bd, dims)
    target_b = torch.arange(len(q_bd), device=q_bd.device) + rank() * len(q_bd)
    id_B = gather(places.passage_id_b)
    same_bB = (places.passage_id_b[:, None] == id_B) | (places.query_id_b[:, None] == id_B)
    false_bB = same_bB | too_close(across_mbB[0], positive_mb[0], *margins)
    false_bB = false_bB.scatter(1, target_b[:, None], value=False)
    in_batch_m = torch.stack(
        [
            cross_entropy((across_bB / temperature).masked_fill(false_bB, -math.inf), target_b)
            for across_bB in across_mbB
        ]
    )
    loss = loss + settings.in_batch_weight * (weight_m @ in_batch_m)
    return loss, Parts(hard_m.detach(), in_batch_m.detach())


def hard_negative_loss(
    positive_b: torch.Tensor, negative_bk: torch.Tensor, keep_bk: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Cross-entropy [b] of each row's passage against those of its own negatives that count; 0 for a row without.

    Takes the cosines of each query with its passage and its hard negatives.
    """
    negative_bk = negative_bk.masked_fill(~keep_bk, -math.inf)
    logits = torch.cat([positive_b[:, None], negative_bk], dim=1) / temperature
    target_b = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return cross_entropy(logits, target_b, reduction="none")


def too_close(
    negative: torch.Tensor, positive_b: torch.Tensor, absolute_margin: float | None, relative_margin: float | None
) -> torch.Tensor:
    """Which negatives [b, any] are too close to their query, by either margin, to be true ones; no gradient.

    The absolute margin is that of sentence-transformers' CachedGISTEmbedLoss.
    """
    close = torch.zeros_like(negative, dtype=torch.bool)
    if absolute_margin is not None:
        close |= negative > (positive_b - absolute_margin)[:, None]
    if relative_margin is not None:
        close |= negative > (positive_b - positive_b.abs() * relative_margin)[:, None]
    return close


def _cosines(q_bd: torch.Tensor, x: torch.Tensor, dims: Sequence[int]) -> list[torch.Tensor]:
    """Cosines of queries with other vectors at each dim.

    The dims are nested, so dot products and squared norms of a dim are those of the next smaller one plus those
    of the columns between: 77 ms of CPU time forward and backward for 256 rows, 7 negatives and 8 dims up to
    1,024, against 127 ms for vectors normalised anew at each dim.

    Args:
        q_bd: query vectors.
        x: [b, k, d], k vectors for each query, or [B, d], the same for all.
        dims: the dims, largest first.

    Returns:
        The cosines [b, k] or [b, B] at each dim.
    """
    found: list[torch.Tensor] = []
    start = 0
    dot, q_b1, square = (torch.zeros((), dtype=x.dtype, device=x.device) for _ in range(3))
    for dim in reversed(dims):
        q, part = q_bd[:, start:dim], x[..., start:dim]
        dot = dot + (q @ part.T if part.ndim == 2 else torch.einsum("bd,bkd->bk", q, part))
        q_b1 = q_b1 + q.square().sum(-1, keepdim=True)
        square = square + part.square().sum(-1)
        found.append(dot * _over_norm(q_b1) * _over_norm(square))
        start = dim
    return found[::-1]


def _over_norm(square: torch.Tensor) -> torch.Tensor:
    """One over the norm, which counts as 1e-12 at least, as in torch's `normalize`."""
    return square.clamp(min=1e-24).rsqrt()


def per_rank(flags: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The number of true flags per rank, never 0: the divisor of a rank's sums."""
    count, ranks = flags.sum().to(dtype), world()
    if ranks > 1:
        torch.distributed.all_reduce(count)
    return (count / ranks).clamp(min=1 / ranks)


def rank() -> int:
    """This process among the workers; 0 outside a process group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world() -> int:
    """Number of workers; 1 outside a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def gather(x_b: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks in rank order; gradient flows back to the rank each row came from."""
    if world() == 1:
        return x_b
    gathered: torch.Tensor = _Gather.apply(x_b)
    return gathered


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums, over ranks, the gradients that reached this rank's rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_b: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x_b) for _ in range(world())]
        torch.distributed.all_gather(parts, x_b.contiguous())
        ctx.rows = len(x_b)  # type: ignore[attr-defined]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_B: torch.Tensor) -> torch.Tensor:
        grad_B = grad_B.contiguous()
        torch.distributed.all_reduce(grad_B)
        rows: int = ctx.rows  # type: ignore[attr-defined]
        return grad_B[rank() * rows : (rank() + 1) * rows]
