"""GradCache (Gao et al. 2021, arXiv 2101.06983): contrastive batches that are larger than memory allows at once.

All texts are encoded without a graph, the loss is computed from their vectors, and its gradient with respect to
the vectors is backpropagated into the encoder chunk by chunk. That keeps the activations of one chunk at a time
and costs a second forward pass of all chunks but one; loss and gradient equal those of a single pass.

Shapes: n texts, c of a chunk, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from f2llm_ray.train.ranks import world

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

    A single chunk costs no second pass. The last chunk is encoded once, with its graph, and its backward pass
    comes first; the others are encoded again, from the random state of their first pass, so that dropout is the
    same. All ranks do as many rounds as the one with the most chunks, since ZeRO communicates in each (with
    unequal rounds ZeRO-3 deadlocks); a rank with fewer chunks encodes one text again, without effect.

    Args:
        encode: returns the vectors [c, d] of the texts at these places, with a graph when gradients are enabled.
        chunks: places 0..n-1, each once and none empty; best with the shortest text last, which is what a rank
            with fewer chunks encodes again.
        loss_of: returns the loss of the vectors [n, d] of all texts, and a second value of any type.
        backward: adds up the gradient of a scalar; its second argument says whether it is the last call.

    Returns:
        The loss, detached, and the second value of `loss_of`.
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
    """The vectors [n, d] of all texts, with the same number of rounds on all ranks, as ZeRO-3 needs."""
    todo = _rounds(chunks)
    vectors = [encode(chunk) for chunk in todo]
    return _in_order(vectors[len(todo) - len(chunks) :], chunks)


def engine_backward(engine: DeepSpeedEngine) -> Callable[[torch.Tensor, bool], None]:
    """The `backward` of a DeepSpeed engine, to be followed by one `engine.step()`.

    Its gradient_accumulation_steps must be 1: gradients add up over the calls here. ZeRO 0 and 1 reduce them over
    ranks in the last call, ZeRO 2 and 3 in each, since a rank keeps only its part.
    """

    def backward(loss: torch.Tensor, last: bool) -> None:
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss)

    return backward


def _rounds(chunks: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """The chunks, after one idle round for each chunk that another rank has more."""
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
