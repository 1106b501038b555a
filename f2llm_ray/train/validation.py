"""Held-out loss and retrieval score, both from one pass over the validation batches on all ranks.

The score needs no encoding of its own: it ranks the vectors that the loss was computed from. So it uses no other
resources, adds little to the time of the loss, and is the same for every number of workers but for rounding.

Shapes: b rows of one rank's part of a batch, d hidden size, q queries and c passages of the sample, u texts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import normalize

from f2llm_ray.data.ragged import Ints
from f2llm_ray.engine.nearest import top_positions
from f2llm_ray.evaluate.metrics.ranking import K, metrics
from f2llm_ray.model.dims import Vectors
from f2llm_ray.train.gradcache import encode_chunks
from f2llm_ray.train.loader import TrainBatch
from f2llm_ray.train.objective import StageLoss, chunks_of, encoder_of, mean_over_ranks
from f2llm_ray.train.ranks import gather

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class HeldOut:
    """The result of a validation."""

    loss: float
    """Mean loss over the held-out batches, computed as in training."""
    score: float | None
    """nDCG@10 of the held-out retrieval queries against all held-out passages; None without any."""


def validate(
    engine: DeepSpeedEngine, loss: StageLoss, batches: Iterable[TrainBatch], world: int
) -> HeldOut | None:
    """Loss and score over held-out batches, the same on all ranks; None without any. Every rank must call it."""
    losses: list[torch.Tensor] = []
    pairs: list[tuple[Ints, Vectors]] = []
    engine.eval()
    with torch.no_grad():
        for batch in batches:
            v_nd = encode_chunks(encoder_of(engine, batch), chunks_of(engine, loss.settings, batch))
            losses.append(loss(v_nd, batch)[0])
            if loss.sources[batch.source].task == "retrieval":
                pairs.append(_pairs(loss.own(v_nd), batch))
    engine.train()
    if not losses:
        return None
    mean = mean_over_ranks(torch.stack(losses).mean(0, keepdim=True), world)[0]
    return HeldOut(mean, score(*map(np.concatenate, zip(*pairs, strict=True))) if pairs else None)


def score(id_b2: Ints, v_b2d: Vectors) -> float | None:
    """nDCG@10 of each distinct query against all distinct passages; None without a pair of two different texts.

    A pair whose two texts are equal is left out; all passages that a query is paired with are relevant to it.

    Args:
        id_b2: ids of each pair's query and passage by content.
        v_b2d: their unit vectors.
    """
    asks = id_b2[:, 0] != id_b2[:, 1]
    id_b2, v_b2d = id_b2[asks], v_b2d[asks]
    if not len(id_b2):
        return None
    _, first_u, text_2b = np.unique(id_b2, return_index=True, return_inverse=True)
    text_b2 = text_2b.reshape(id_b2.shape)
    query_q, row_b = np.unique(text_b2[:, 0], return_inverse=True)
    passage_c, passage_b = np.unique(text_b2[:, 1], return_inverse=True)
    relevant_r2 = np.unique(np.column_stack([row_b, passage_b]), axis=0)
    vectors_ud = v_b2d.reshape(-1, v_b2d.shape[-1])[first_u]
    top_qk = top_positions(vectors_ud, query_q, passage_c, k=K)
    return float(metrics(top_qk, relevant_r2, len(passage_c))["ndcg@10"].mean())


def _pairs(v_nd: torch.Tensor, batch: TrainBatch) -> tuple[Ints, Vectors]:
    """Ids [b, 2] and unit vectors [b, 2, d] of the batch's pairs on all ranks."""
    place_b2 = torch.from_numpy(np.column_stack([batch.query, batch.passage])).to(v_nd.device)
    id_b2 = torch.from_numpy(np.column_stack([batch.query_id, batch.passage_id])).to(v_nd.device)
    v_b2d = normalize(v_nd.float(), dim=-1)[place_b2]
    return gather(id_b2).cpu().numpy(), gather(v_b2d).cpu().numpy()
