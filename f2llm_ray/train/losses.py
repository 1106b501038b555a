"""The objective: contrastive terms, matryoshka weights and distillation, as pure functions.

Shapes: b rows of this rank, B rows of all ranks, k negatives, d hidden size. `q_bd` queries, `p_bd` passages,
`n_bkd` negatives. Similarities are cosines over a temperature (paper: 0.05).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, mse_loss, normalize


def matryoshka_weights(dims: Sequence[int]) -> dict[int, float]:
    """Weight of each dim: the i-th largest has 1 / (i * sqrt(d / dim)), i from 1 (paper's public code)."""
    largest_first = sorted(dims, reverse=True)
    full = largest_first[0]
    return {dim: 1 / (i * math.sqrt(full / dim)) for i, dim in enumerate(largest_first, start=1)}


def hard_negative_loss(
    q_bd: torch.Tensor, p_bd: torch.Tensor, n_bkd: torch.Tensor, has_bk: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Cross-entropy of each row's passage against its own negatives, averaged over the rows that have any.

    Args:
        q_bd: unit query vectors.
        p_bd: unit passage vectors.
        n_bkd: unit negative vectors; what stands where has_bk is false does not count.
        has_bk: whether there is a negative.
        temperature: the softmax temperature.
    """
    positive_b1 = (q_bd * p_bd).sum(-1, keepdim=True)
    negative_bk = torch.einsum("bd,bkd->bk", q_bd, n_bkd).masked_fill(~has_bk, -math.inf)
    logits = torch.cat([positive_b1, negative_bk], dim=1) / temperature
    target_b = torch.zeros(len(q_bd), dtype=torch.long, device=q_bd.device)
    loss_b = cross_entropy(logits, target_b, reduction="none")
    counts_b = has_bk.any(dim=1)
    return (loss_b * counts_b).sum() / counts_b.sum().clamp(min=1)


def in_batch_loss(
    q_bd: torch.Tensor,
    p_Bd: torch.Tensor,
    same_bB: torch.Tensor,
    offset: int,
    temperature: float,
) -> torch.Tensor:
    """Cross-entropy of each query's passage against the passages of all rows of all ranks.

    Args:
        q_bd: unit query vectors of this rank.
        p_Bd: unit passage vectors of all ranks, in rank order.
        same_bB: whether a passage has the same content as the row's own; such a one is no negative.
        offset: row of p_Bd that is this rank's first.
        temperature: the softmax temperature.
    """
    target_b = torch.arange(offset, offset + len(q_bd), device=q_bd.device)
    other_bB = same_bB.scatter(1, target_b[:, None], value=False)
    logits_bB = (q_bd @ p_Bd.T / temperature).masked_fill(other_bB, -math.inf)
    return cross_entropy(logits_bB, target_b)


@dataclass(frozen=True)
class Places:
    """Which vector is what in a rank's batch: the look-ups of `train.loader.Batch` as tensors."""

    query_b: torch.Tensor
    passage_b: torch.Tensor
    negative_bk: torch.Tensor
    """-1 where a row has fewer negatives."""
    passage_id_b: torch.Tensor


def contrastive_loss(
    v_nd: torch.Tensor,
    places: Places,
    *,
    dims: Sequence[int],
    temperature: float,
    in_batch: bool,
    gather_gradient: bool = True,
) -> torch.Tensor:
    """The paper's objective: hard-negative and (for retrieval) in-batch term, summed over the matryoshka dims.

    Args:
        v_nd: vectors of the rank's distinct texts, before normalisation.
        places: which of them is what.
        dims: matryoshka dims.
        temperature: the softmax temperature.
        in_batch: whether the batch is of a retrieval source.
        gather_gradient: gradient to other ranks' passages; false reproduces the paper's public code, in which
            gathered passages, the rank's own among them, get no gradient from the in-batch term.
    """
    q_bd, p_bd = v_nd[places.query_b], v_nd[places.passage_b]
    has_bk = places.negative_bk >= 0
    n_bkd = v_nd[places.negative_bk.clamp(min=0)]
    if in_batch:
        p_Bd = gather(p_bd) if gather_gradient else gather(p_bd.detach())
        id_B = gather(places.passage_id_b)
        same_bB = places.passage_id_b[:, None] == id_B[None, :]
    # Not a constant zero: a batch without any negatives still needs a graph to go backward through.
    total = v_nd.sum() * 0
    for dim, weight in matryoshka_weights(dims).items():
        q, p = normalize(q_bd[:, :dim], dim=-1), normalize(p_bd[:, :dim], dim=-1)
        if places.negative_bk.shape[1]:
            n = normalize(n_bkd[..., :dim], dim=-1)
            total = total + weight * hard_negative_loss(q, p, n, has_bk, temperature)
        if in_batch:
            offset = rank() * len(q)
            gathered = normalize(p_Bd[:, :dim], dim=-1)
            total = total + weight * in_batch_loss(q, gathered, same_bB, offset, temperature)
    return total


def distillation_loss(v_nd: torch.Tensor, teacher_nD: torch.Tensor) -> torch.Tensor:
    """MSE between un-normalised vectors and the first d dims of the teacher's (paper)."""
    return mse_loss(v_nd, teacher_nD[:, : v_nd.shape[1]])


def rank() -> int:
    """This process among the workers; 0 outside a process group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def gather(x_b: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks in rank order; gradient flows back to the rank each row came from."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return x_b
    gathered: torch.Tensor = _Gather.apply(x_b)
    return gathered


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums, over ranks, the gradients that reached this rank's rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_b: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x_b) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, x_b.contiguous())
        ctx.rows = len(x_b)  # type: ignore[attr-defined]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_B: torch.Tensor) -> torch.Tensor:
        grad_B = grad_B.contiguous()
        torch.distributed.all_reduce(grad_B)
        rows: int = ctx.rows  # type: ignore[attr-defined]
        return grad_B[rank() * rows : (rank() + 1) * rows]
