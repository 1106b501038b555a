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
from f2llm_ray.train.ranks import gather, per_rank, rank
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

    by_dim: Mapping[str, torch.Tensor]
    """The contrastive terms that the batch has, each of every dim [m]: "hard_negative", and for retrieval
    "in_batch" and "passage_to_query"."""
    terms: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The further terms by name (train/terms.py)."""
    by_exit: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """The weighted loss of each exit before the last layer, by its number of layers; all else is the mean over the
    exits and the whole model."""

    @property
    def total_m(self) -> torch.Tensor:
        """The sum of the contrastive terms of each dim."""
        return torch.stack(list(self.by_dim.values())).sum(0)


def mean_parts(every: Sequence[Parts]) -> Parts:
    """The means of the terms of several losses of one batch."""

    def mean(values: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([value[name] for value in values]).mean(0) for name in values[0]}

    return Parts(mean([parts.by_dim for parts in every]), mean([parts.terms for parts in every]))


def matryoshka_weights(dims: Sequence[int]) -> dict[int, float]:
    """Weight of each dim: the i-th largest has 1 / (i * sqrt(d / dim)), i from 1 (paper's public code)."""
    largest_first = sorted(dims, reverse=True)
    full = largest_first[0]
    return {dim: 1 / (i * math.sqrt(full / dim)) for i, dim in enumerate(largest_first, start=1)}


def contrastive(
    v_nd: torch.Tensor, places: TextPlaces, settings: TrainStage, task: Task, dims: Sequence[int] | None = None
) -> tuple[torch.Tensor, Parts]:
    """The paper's objective: hard-negative and, for retrieval, in-batch term, summed over the matryoshka dims.

    Beside the paper's terms, where the settings ask for them: the in-batch term from passages to queries, and
    texts of the anchor's own side as further negatives in both directions (Li et al. 2023, GTE, arXiv 2308.03281).

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
        dims: the matryoshka dims; the doublings of the smallest one below d, and d, when unset.

    Returns:
        The loss of this rank, and its parts.
    """
    weights = matryoshka_weights(dims or matryoshka_dims(v_nd.shape[1], settings.matryoshka_min_dim))
    dims = list(weights)
    q_bd, p_bd = v_nd[places.query_b], v_nd[places.passage_b]
    positive_mb = torch.stack([positive_b1[:, 0] for positive_b1 in _cosines(q_bd, p_bd[:, None], dims)])
    rule = _Rule(settings, settings.temperatures.get(task, settings.temperature), positive_mb[0])
    found = {"hard_negative": _own_negatives(v_nd, places, dims, positive_mb, rule)}
    factors = {
        "hard_negative": settings.hard_negative_weight,
        "in_batch": settings.in_batch_weight,
        "passage_to_query": settings.passage_to_query_weight,
    }
    if task == "retrieval":
        queries, passages = _sides(q_bd, p_bd, places, settings)
        found["in_batch"] = _across(queries, passages, dims, rule)
        if settings.passage_to_query_weight > 0:
            found["passage_to_query"] = _across(passages, queries, dims, rule)
    weight_m = torch.tensor(list(weights.values()), dtype=positive_mb.dtype, device=v_nd.device)
    loss = torch.stack([factors[name] * (weight_m @ term_m) for name, term_m in found.items()]).sum()
    return loss, Parts({name: term_m.detach() for name, term_m in found.items()})


@dataclass(frozen=True)
class _Rule:
    """Which negatives of a batch count, and how their cosines become a loss."""

    settings: TrainStage
    temperature: float
    positive_b: torch.Tensor
    """The cosine of each row's query and passage at all dims."""

    def loss(self, positive_b: torch.Tensor, negative: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Cross-entropy [b] of each row's positive against those of its negatives [b, any] that count.

        It is 0 for a row without any. With `hardness` a negative of cosine s counts exp(hardness * s) times, a
        factor that has no gradient (EmbeddingGemma, arXiv 2509.20354).
        """
        logits = negative / self.temperature
        if self.settings.hardness:
            logits = logits + self.settings.hardness * negative.detach()
        logits = torch.cat([positive_b[:, None] / self.temperature, logits.masked_fill(~keep, -math.inf)], dim=1)
        target_b = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return cross_entropy(logits, target_b, reduction="none")

    def true_negatives(self, negative: torch.Tensor) -> torch.Tensor:
        """Which negatives [b, any] are not too close to their anchor, by their cosines at all dims."""
        margins = self.settings.absolute_margin, self.settings.relative_margin
        return ~too_close(negative, self.positive_b, *margins)


def _own_negatives(
    v_nd: torch.Tensor, places: TextPlaces, dims: Sequence[int], positive_mb: torch.Tensor, rule: _Rule
) -> torch.Tensor:
    """The hard-negative term [m]: the mean over rows that brought a negative."""
    cosines_mbk = _cosines(v_nd[places.query_b], v_nd[places.negative_bk.clamp(min=0)], dims)
    has_bk = places.negative_bk >= 0
    own_bk = (places.negative_bk == places.passage_b[:, None]) | (places.negative_bk == places.query_b[:, None])
    keep_bk = has_bk & ~own_bk & rule.true_negatives(cosines_mbk[0])
    rows = per_rank(has_bk.any(1), v_nd.dtype)
    of_dims = zip(positive_mb, cosines_mbk, strict=True)
    return torch.stack(
        [rule.loss(positive_b, negative_bk, keep_bk).sum() / rows for positive_b, negative_bk in of_dims]
    )


@dataclass(frozen=True)
class _Side:
    """The queries, or the passages, of a batch."""

    own_bd: torch.Tensor
    every_Bd: torch.Tensor
    """Those of all ranks."""
    false_bB: torch.Tensor
    """Which of them are no negatives of a row's query and passage, by what they read: the row's own, those of rows
    that share its query or its passage, and those that read like the row's other text."""


def _sides(
    q_bd: torch.Tensor, p_bd: torch.Tensor, places: TextPlaces, settings: TrainStage
) -> tuple[_Side, _Side]:
    """Queries and passages. Those of all ranks are gathered where a term needs them."""
    query_b, passage_b = places.query_id_b[:, None], places.passage_id_b[:, None]
    query_B, passage_B = gather(places.query_id_b), gather(places.passage_id_b)
    related_bB = (query_b == query_B) | (passage_b == passage_B)

    def every(own_bd: torch.Tensor, *, used: bool = True) -> torch.Tensor:
        if not used:
            return own_bd
        return gather(own_bd) if settings.gather_gradient else gather(own_bd.detach())

    both = settings.passage_to_query_weight > 0 or settings.same_side_negatives
    queries = _Side(q_bd, every(q_bd, used=both), related_bB | (passage_b == query_B))
    passages = _Side(p_bd, every(p_bd), related_bB | (query_b == passage_B))
    return queries, passages


def _across(anchor: _Side, other: _Side, dims: Sequence[int], rule: _Rule) -> torch.Tensor:
    """The in-batch term [m] of one direction: each anchor's positive against the other side's texts of all ranks.

    With `same_side_negatives` the anchors of all ranks stand among the negatives too.
    """
    sides = (other, anchor) if rule.settings.same_side_negatives else (other,)
    cosines = (_cosines(anchor.own_bd, side.every_Bd, dims) for side in sides)
    cosines_mbN = [torch.cat(of_sides, dim=1) for of_sides in zip(*cosines, strict=True)]
    keep_bN = ~torch.cat([side.false_bB for side in sides], dim=1) & rule.true_negatives(cosines_mbN[0])
    row_b = torch.arange(len(anchor.own_bd), device=keep_bN.device)
    own_b = row_b + rank() * len(row_b)
    return torch.stack([rule.loss(part_bN[row_b, own_b], part_bN, keep_bN).mean() for part_bN in cosines_mbN])


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
