"""The loss terms of distillation, from a student's and a teacher's vectors, as pure functions.

Shapes: n texts of this rank, d dims of the student, D of the teacher, b rows of this rank, B rows of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity, kl_div, log_softmax, normalize

from f2llm_ray.train.losses import TextPlaces, gather, per_rank


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """The weights of the terms; a weight of 0 leaves a term out. The defaults are the paper's."""

    mse_weight: float = 1.0
    cosine_weight: float = 0.0
    similarity_weight: float = 0.0
    similarity_temperature: float = 0.05
    gather_gradient: bool = True
    """Gradient to other ranks' passages in the similarity term."""


def distillation(
    v_nd: torch.Tensor,
    matched_nD: torch.Tensor,
    teacher_nD: torch.Tensor,
    places: TextPlaces,
    lesson: Lesson,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted terms on a rank's texts; the mean over ranks is that of the global batch.

    Args:
        v_nd: the student's vectors before normalisation.
        matched_nD: the vectors that should equal the teacher's: the student's own, or a projection of them.
        teacher_nD: the teacher's vectors of the same texts before normalisation; as many of their first dims as
            `matched_nD` has count in the terms on single vectors, all in the term on similarities.
        places: the role of each text.
        lesson: weights of the terms.

    Returns:
        The loss of this rank, and each of its terms, detached and unweighted.
    """
    target_nD = teacher_nD[:, : matched_nD.shape[1]]
    terms: dict[str, tuple[float, torch.Tensor]] = {}
    if lesson.mse_weight:
        error_n = (matched_nD - target_nD).square().mean(1)
        terms["mse"] = lesson.mse_weight, mean_over_places(error_n, places)
    if lesson.cosine_weight:
        angle_n = 1 - cosine_similarity(matched_nD, target_nD, dim=1)
        terms["cosine"] = lesson.cosine_weight, mean_over_places(angle_n, places)
    if lesson.similarity_weight:
        divergence = similarity_loss(
            v_nd, teacher_nD, places, lesson.similarity_temperature, gather_gradient=lesson.gather_gradient
        )
        terms["similarity"] = lesson.similarity_weight, divergence
    loss = sum((weight * term for weight, term in terms.values()), v_nd.new_zeros(()))
    return loss, {name: term.detach() for name, (_, term) in terms.items()}


def mean_over_places(value_n: torch.Tensor, places: TextPlaces) -> torch.Tensor:
    """The mean over queries, passages and negatives, as in the paper: a text counts once for each of its places.

    The mean over distinct texts would depend on how the rows of the global batch are distributed over ranks.
    """
    negative = places.negative_bk[places.negative_bk >= 0]
    place = torch.cat([places.query_b, places.passage_b, negative])
    (count,) = per_rank(torch.ones_like(place), dtype=value_n.dtype)
    return value_n[place].sum() / count


def similarity_loss(
    v_nd: torch.Tensor,
    teacher_nD: torch.Tensor,
    places: TextPlaces,
    temperature: float,
    *,
    gather_gradient: bool = True,
) -> torch.Tensor:
    """KL divergence between the teacher's and the student's softmax over all ranks' passages, mean over queries.

    Both are over cosines divided by the temperature, in each model's own dims, whose numbers may differ. Without
    the factor of the squared temperature of Hinton et al. 2015, the gradient is about as large as that of the
    contrastive terms.
    """
    student_bB, teacher_bB = (
        log_softmax(_cosines(vectors, places, gradient=gradient) / temperature, dim=1)
        for vectors, gradient in ((v_nd, gather_gradient), (teacher_nD, False))
    )
    return kl_div(student_bB, teacher_bB, reduction="batchmean", log_target=True)


def _cosines(v_nd: torch.Tensor, places: TextPlaces, *, gradient: bool) -> torch.Tensor:
    """Cosines [b, B] of this rank's queries and all passages."""
    unit_nd = normalize(v_nd, dim=1)
    p_bd = unit_nd[places.passage_b]
    return unit_nd[places.query_b] @ gather(p_bd if gradient else p_bd.detach()).T
