"""Further terms of the loss beside the contrastive one, as pure functions in the table `TERMS`.

A new loss is a function, its entry in `TERMS`, and a setting `<name>_weight` of the stage.

Shapes: n texts of this rank, d dims of the model, D of the teacher, b rows of this rank, B rows of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity, kl_div, log_softmax, normalize

from f2llm_ray.train.losses import TextPlaces
from f2llm_ray.train.ranks import gather, per_rank
from f2llm_ray.train.settings import Distill, TrainStage


@dataclass(frozen=True, kw_only=True)
class TermInputs:
    """What a term is computed from: the vectors of the rank's distinct texts, before normalization."""

    v_nd: torch.Tensor
    """The model's vectors."""
    places: TextPlaces
    """The role of each text."""
    settings: TrainStage
    scores_bk: torch.Tensor | None = None
    """What a teacher says of each row's passage, then of its negatives; NaN where it says nothing, None where the
    batch's source brings no scores."""
    matched_nD: torch.Tensor | None = None
    """The vectors that should equal the teacher's: the model's own, or a projection; None without a teacher."""
    teacher_nD: torch.Tensor | None = None
    """The teacher's vectors. Terms on single vectors use as many of their first dims as `matched_nD` has."""

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The matched vectors, and the teacher's cut to as many dims."""
        assert self.matched_nD is not None  # noqa: S101 - such terms are settings of a stage with a teacher
        assert self.teacher_nD is not None  # noqa: S101
        return self.matched_nD, self.teacher_nD[:, : self.matched_nD.shape[1]]


def added_terms(inputs: TermInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sum of the terms whose weight is above 0, times their weights; and each term, detached and unweighted.

    Terms are of this rank's texts; their mean over ranks is that of the global batch.
    """
    weights = {name: getattr(inputs.settings, f"{name}_weight", 0.0) for name in TERMS}
    terms = {name: TERMS[name](inputs) for name, weight in weights.items() if weight > 0}
    loss = sum((weights[name] * term for name, term in terms.items()), inputs.v_nd.new_zeros(()))
    return loss, {name: term.detach() for name, term in terms.items()}


def spread_loss(inputs: TermInputs) -> torch.Tensor:
    """Mean squared cosine of different queries, plus that of different passages, over those of all ranks.

    It is the second moment of the global orthogonal regulariser (Zhang et al. 2017, arXiv 1708.06320), as
    EmbeddingGemma (arXiv 2509.20354) has it. Texts that read the same are no pair.
    """
    places, gradient = inputs.places, inputs.settings.gather_gradient
    sides = (places.query_b, places.query_id_b), (places.passage_b, places.passage_id_b)
    means = []
    for place_b, id_b in sides:
        unit_bd = normalize(inputs.v_nd[place_b], dim=1)
        cosine_bB = unit_bd @ gather(unit_bd if gradient else unit_bd.detach()).T
        differs_bB = id_b[:, None] != gather(id_b)
        means.append(cosine_bB.square()[differs_bB].sum() / per_rank(differs_bB, cosine_bB.dtype))
    return torch.stack(means).sum()


def mse_loss(inputs: TermInputs) -> torch.Tensor:
    """Mean squared error, the paper's term."""
    matched_nD, target_nD = inputs.pair()
    return mean_over_places((matched_nD - target_nD).square().mean(1), inputs.places)


def cosine_loss(inputs: TermInputs) -> torch.Tensor:
    """One minus the cosine (Jasper and Stella, arXiv 2412.19048)."""
    return mean_over_places(1 - cosine_similarity(*inputs.pair(), dim=1), inputs.places)


def similarity_loss(inputs: TermInputs) -> torch.Tensor:
    """KL divergence between the teacher's and the student's softmax over all ranks' passages, mean over queries.

    Both are over cosines divided by the temperature, in each model's own dims, whose numbers may differ. Without
    the factor of the squared temperature of Hinton et al. 2015, the gradient is about as large as that of the
    contrastive terms.
    """
    settings, teacher_nD = inputs.settings, inputs.teacher_nD
    assert isinstance(settings, Distill)  # noqa: S101 - no other stage has the setting
    assert teacher_nD is not None  # noqa: S101
    student_bB, teacher_bB = (
        log_softmax(
            query_cosines(vectors, inputs.places, gradient=gradient) / settings.similarity_temperature, dim=1
        )
        for vectors, gradient in ((inputs.v_nd, settings.gather_gradient), (teacher_nD, False))
    )
    return kl_div(student_bB, teacher_bB, reduction="batchmean", log_target=True)


def margin_loss(inputs: TermInputs) -> torch.Tensor:
    """MSE between the teacher's and the student's margins: cosine of query and passage minus that of a negative.

    The mean is over all negatives that rows brought (Hofstätter et al. 2020, arXiv 2010.02666).
    """
    assert inputs.teacher_nD is not None  # noqa: S101 - the setting is one of a stage with a teacher
    student_m, teacher_m = (margins(vectors, inputs.places) for vectors in (inputs.v_nd, inputs.teacher_nD))
    return (student_m - teacher_m).square().sum() / per_rank(inputs.places.negative_bk >= 0, student_m.dtype)


def score_margin_loss(inputs: TermInputs) -> torch.Tensor:
    """MSE between the margins of the rows' scores and the model's: that of the passage minus that of a negative.

    The mean is over all negatives with a score (Hofstätter et al. 2020, arXiv 2010.02666).
    """
    logits_bk, scores_bk, known_bk = scored_logits(inputs)
    margins_bk = (logits_bk[:, :1] - logits_bk[:, 1:]) - (scores_bk[:, :1] - scores_bk[:, 1:])
    known_bk = known_bk[:, 1:]
    return margins_bk[known_bk].square().sum() / per_rank(known_bk, margins_bk.dtype)


def score_kl_loss(inputs: TermInputs) -> torch.Tensor:
    """KL divergence between the softmax of a row's scores and the model's, over its passage and negatives.

    The mean is over the rows that have a negative with a score.
    """
    logits_bk, scores_bk, known_bk = scored_logits(inputs)
    row_b = known_bk[:, 1:].any(1)
    model_bk, teacher_bk = (
        log_softmax(x_bk.masked_fill(~known_bk, -math.inf), dim=1) for x_bk in (logits_bk, scores_bk)
    )
    # Left out before the product: of what is not known both are -inf.
    known_bk = known_bk & row_b[:, None]
    teacher_m = teacher_bk[known_bk]
    return (teacher_m.exp() * (teacher_m - model_bk[known_bk])).sum() / per_rank(row_b, teacher_m.dtype)


TERMS: dict[str, Callable[[TermInputs], torch.Tensor]] = {
    "spread": spread_loss,
    "mse": mse_loss,
    "cosine": cosine_loss,
    "similarity": similarity_loss,
    "margin": margin_loss,
    "score_margin": score_margin_loss,
    "score_kl": score_kl_loss,
}
"""The terms by name; the weight of each is the stage's setting `<name>_weight`, and 0 without one."""


def mean_over_places(value_n: torch.Tensor, places: TextPlaces) -> torch.Tensor:
    """The mean over queries, passages and negatives, as in the paper: a text counts once for each of its places.

    The mean over distinct texts would depend on how the rows of the global batch are distributed over ranks.
    """
    negative = places.negative_bk[places.negative_bk >= 0]
    place = torch.cat([places.query_b, places.passage_b, negative])
    return value_n[place].sum() / per_rank(torch.ones_like(place), value_n.dtype)


def margins(v_nd: torch.Tensor, places: TextPlaces) -> torch.Tensor:
    """The margin [m] of each hard negative of the rank: its query's cosine with the passage, less that with it."""
    unit_nd = normalize(v_nd, dim=1)
    row_m, column_m = (places.negative_bk >= 0).nonzero(as_tuple=True)
    query_md, passage_md = unit_nd[places.query_b[row_m]], unit_nd[places.passage_b[row_m]]
    return (query_md * (passage_md - unit_nd[places.negative_bk[row_m, column_m]])).sum(1)


def scored_logits(inputs: TermInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The model's logits of each row's passage and negatives [b, 1 + k], the scaled scores, and which have one."""
    settings, places, scores_bk = inputs.settings, inputs.places, inputs.scores_bk
    assert scores_bk is not None  # noqa: S101 - the recipe is checked: all of the stage's sources bring scores
    temperature = settings.temperatures.get("retrieval", settings.temperature)
    unit_nd = normalize(inputs.v_nd, dim=1)
    text_bk = torch.cat([places.passage_b[:, None], places.negative_bk], dim=1)
    cosine_bk = torch.einsum("bd,bkd->bk", unit_nd[places.query_b], unit_nd[text_bk.clamp(min=0)])
    known_bk = (text_bk >= 0) & ~scores_bk.isnan()
    return cosine_bk / temperature, scores_bk * settings.score_scale, known_bk


def query_cosines(v_nd: torch.Tensor, places: TextPlaces, *, gradient: bool) -> torch.Tensor:
    """Cosines [b, B] of this rank's queries and the passages of all ranks; `gradient` is that to the passages."""
    unit_nd = normalize(v_nd, dim=1)
    p_bd = unit_nd[places.passage_b]
    return unit_nd[places.query_b] @ gather(p_bd if gradient else p_bd.detach()).T
