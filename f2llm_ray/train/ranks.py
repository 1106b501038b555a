"""What the workers of a training are to each other: rank, world size, and sums and rows of all of them.

Shapes: b rows of this rank, B rows of all ranks.
"""

from __future__ import annotations

import torch


def rank() -> int:
    """This process among the workers; 0 outside a process group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world() -> int:
    """Number of workers; 1 outside a process group."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def per_rank(flags: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The number of true flags per rank, never 0: the divisor of a rank's sums."""
    count, ranks = flags.sum().to(dtype), world()
    if ranks > 1:
        torch.distributed.all_reduce(count)
    return (count / ranks).clamp(min=1 / ranks)


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
