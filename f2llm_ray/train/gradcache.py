"""GradCache (Gao et al. 2021, arXiv 2101.06983): the contrastive batch is bounded by the recipe, not by memory.

All texts are encoded without a graph, the loss is taken on their vectors, and its gradient with respect to the
vectors is carried into the encoder chunk by chunk. That holds the activations of one chunk at a time and costs a
second forward pass of all chunks but one; loss and gradient are those of the direct way.

Shapes: n texts, c of a chunk, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from f2llm_ray.train.losses import world

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Extra = TypeVar("Extra")
Rng = tuple[torch.Tensor, torch.Tensor | None]


def cached_backward(
    encode: Callable[[Sequence[int]], torch.Tensor],
    chunks: Sequence[Sequence[int]],
    loss_of: Callable[[torch.Tensor], tuple[torch.Tensor, Extra]],
    backward: Callable[[torch.Tensor, bool], None],
) -> tuple[torch.Tensor, Extra]:
    """Computes the loss of a batch and its gradient, holding the activations of one chunk at a time.

    With a single chunk this is the direct way, at no more cost. The last chunk is encoded once, with its graph,
    and goes backward first; the others are encoded again, from the random state that they were first encoded
    from, so that dropout drops the same. All ranks do as many rounds as the one with the most chunks, since ZeRO
    communicates in each (with unequal rounds ZeRO-3 waits for ever); a rank with fewer chunks encodes one text
    again, without effect.

    Args:
        encode: gives the vectors [c, d] of the texts at these places, with a graph when gradients are on.
        chunks: places 0..n-1, each once and none empty; best with the shortest text last, which is what a rank
            with fewer chunks encodes again.
        loss_of: gives the loss of the vectors [n, d] of all texts and whatever else is known then.
        backward: takes a scalar whose gradient is to be added up, and whether it is the step's last.

    Returns:
        The loss, detached, and what else `loss_of` gave.
    """
    todo = _rounds(chunks)
    idle = len(todo) - len(chunks)
    states: list[Rng] = []
    vectors: list[torch.Tensor] = []
    with torch.no_grad():
        for chunk in todo[:-1]:
            states.append(_rng())
            vectors.append(encode(chunk))
    last_cd = encode(todo[-1])
    v_nd = _in_order([*vectors[idle:], last_cd.detach()], chunks).requires_grad_()
    loss, extra = loss_of(v_nd)
    (grad_nd,) = torch.autograd.grad(loss, v_nd)
    after = _rng()
    backward((last_cd * grad_nd[list(todo[-1])]).sum(), len(todo) == 1)
    del last_cd
    for number, (chunk, state) in enumerate(zip(todo[:-1], states, strict=True)):
        _set_rng(state)
        grad_cd = grad_nd[list(chunk)] * float(number >= idle)
        backward((encode(chunk) * grad_cd).sum(), number == len(todo) - 2)
    _set_rng(after)
    return loss.detach(), extra


def encode_chunks(
    encode: Callable[[Sequence[int]], torch.Tensor], chunks: Sequence[Sequence[int]]
) -> torch.Tensor:
    """The vectors [n, d] of all texts, in as many rounds on all ranks: what a validation under ZeRO-3 needs."""
    todo = _rounds(chunks)
    vectors = [encode(chunk) for chunk in todo]
    return _in_order(vectors[len(todo) - len(chunks) :], chunks)


def engine_backward(engine: DeepSpeedEngine) -> Callable[[torch.Tensor, bool], None]:
    """The `backward` of a DeepSpeed engine, which then takes one `engine.step()`.

    Its gradient_accumulation_steps must be 1: gradients add up over the calls here. ZeRO 0 and 1 reduce them over
    ranks in the last call, ZeRO 2 and 3 in each, since a rank keeps only its part.
    """

    def backward(loss: torch.Tensor, last: bool) -> None:
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss)

    return backward


def _rounds(chunks: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """The chunks, after as many idle rounds as the rank with the most chunks is ahead."""
    most = len(chunks)
    if world() > 1:
        device = "cuda" if "nccl" in torch.distributed.get_backend() else "cpu"
        count = torch.tensor(most, device=device)
        torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
        most = int(count)
    return [chunks[-1][-1:]] * (most - len(chunks)) + list(chunks)


def _in_order(vectors: Sequence[torch.Tensor], chunks: Sequence[Sequence[int]]) -> torch.Tensor:
    """The chunks' vectors as [n, d], each at its place."""
    v_nd = torch.cat(list(vectors))
    place_n = torch.tensor([place for chunk in chunks for place in chunk], device=v_nd.device)
    return v_nd[torch.argsort(place_n)]


def _rng() -> Rng:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_rng(state: Rng) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
