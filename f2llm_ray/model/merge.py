"""Merging: one model of several, or of several checkpoints of a training, weight by weight.

The paper's code saves extra weights over the last steps of a training for this. The mean of weights along one
training is from "Averaging weights leads to wider optima" (arXiv 1803.05407); slerp keeps the length that a mean
of two directions loses, and is what Qwen3-Embedding merges by (arXiv 2506.05176).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


def average(tensors: Iterable[torch.Tensor], weights: Sequence[float] | None = None) -> torch.Tensor:
    """The mean of tensors of one shape, summed in float64 one after the other; equal ones give that very tensor.

    Args:
        tensors: the tensors.
        weights: of each; equal ones when unset.

    Raises:
        ValueError: none were given.
    """
    total, whole, dtype = torch.zeros((), dtype=torch.float64), 0.0, torch.float32
    for place, tensor in enumerate(tensors):
        weight = 1.0 if weights is None else weights[place]
        total, whole, dtype = total + weight * tensor.double(), whole + weight, tensor.dtype
    if not whole:
        raise ValueError("nothing to average")
    return (total / whole).to(dtype)


def slerp(first: torch.Tensor, second: torch.Tensor, place: float = 0.5) -> torch.Tensor:
    """The tensor at `place` (0 to 1) on the arc from the first to the second, each taken as one long vector.

    The ends are exact. Where the angle is too small for a sine, or nothing but zeros has no angle, the arc is the
    straight line.
    """
    a, b = first.double(), second.double()
    lengths = a.norm() * b.norm()
    angle = torch.arccos((torch.sum(a * b) / lengths).clamp(-1, 1)) if lengths > 0 else a.new_zeros(())
    # float64 knows a cosine near 1 to 1e-16 and so the angle to 1e-8; opposite vectors have no arc between them.
    if angle.sin() < 1e-6:
        return torch.lerp(a, b, place).to(first.dtype)
    merged = a * (((1 - place) * angle).sin() / angle.sin()) + b * ((place * angle).sin() / angle.sin())
    return merged.to(first.dtype)
