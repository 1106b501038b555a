"""Input embeddings of a random model computed from its own training pairs, before any step.

A token is the pairs that it stands in, on either side, so that words that translate or answer each other lie near
each other: latent semantic indexing over both texts of a pair (Deerwester et al. 1990; across languages, Dumais et
al. 1997). The table of tokens by pairs, weighted by tf-idf, is cut to its main left singular vectors by subspace
iteration (Halko et al. 2011). A model with mean pooling finds by them before its layers have learned anything.
Shapes: v entries, p pairs, d hidden size, q directions that are iterated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.model.embeddings import signed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_PAIRS = 200_000
"""Rows that are read at most, about: 80,000 rows of short texts take 10 s of one core for 128 dims."""
EXTRA = 10
"""Directions beside those that are kept: the last ones converge slowly."""
ITERATIONS = 5
SIZE = 0.3
"""Root mean square of an entry. Steps turn larger ones less: after the quickstart's first stage the nDCG@10 of its
first 128, 32 and 16 dims was 0.194, 0.169 and 0.132 with 0.3, and 0.188, 0.148 and 0.111 with 1."""
PAIRS_AT_ONCE = 32_768


def put_pair_embeddings(
    backbone: PreTrainedModel, queries: Sequence[Tokens], passages: Sequence[Tokens], seed: int
) -> None:
    """Puts the embeddings of a model's training pairs into it.

    A token that stands in no pair keeps its random direction, at the same length.
    """
    table_vd = backbone.get_input_embeddings().weight
    found_vd = pair_embeddings(queries, passages, *table_vd.shape, seed=seed).to(table_vd.dtype)
    with torch.no_grad():
        missing_v = (found_vd == 0).all(dim=1)
        found_vd[missing_v] = torch.nn.functional.normalize(table_vd[missing_v], dim=1)
        table_vd.copy_(found_vd * SIZE * table_vd.shape[1] ** 0.5)


def pair_embeddings(
    queries: Sequence[Tokens], passages: Sequence[Tokens], vocabulary: int, dims: int, *, seed: int
) -> torch.Tensor:
    """Unit vectors [v, dims] of the tokens of pairs; zeros for those that stand in none.

    Every direction counts alike, whatever its singular value: with the values, the vectors are mostly how often a
    token is used. On one thread, so that the result does not depend on their number.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        parts = _weighted(queries, passages, vocabulary)
        generator = torch.Generator().manual_seed(seed)
        basis_vq = torch.randn(vocabulary, min(dims + EXTRA, vocabulary), generator=generator, dtype=torch.float64)
        for _ in range(ITERATIONS):
            basis_vq = torch.linalg.qr(_twice(parts, basis_vq)).Q
        values_q, turn_qq = torch.linalg.eigh(basis_vq.T @ _twice(parts, basis_vq))  # the largest last
        main_vd = basis_vq @ turn_qq.flip(1)[:, :dims]
        main_vd[:, values_q.flip(0)[:dims] <= values_q.max() * 1e-12] = 0  # fewer pairs than dims
        return torch.nn.functional.normalize(signed(main_vd) * _there(parts), dim=1)
    finally:
        torch.set_num_threads(threads)


def _weighted(queries: Sequence[Tokens], passages: Sequence[Tokens], vocabulary: int) -> list[torch.Tensor]:
    """The tokens of each pair by tf-idf, at length 1: sparse parts [some of p, v] that lie one below the other."""
    lengths = [len(text) for text in (*queries, *passages)]
    pair_t = np.repeat(np.tile(np.arange(len(queries)), 2), lengths)
    codes, counts = np.unique(
        pair_t * vocabulary + np.concatenate([*queries, *passages]).astype(np.int64), return_counts=True
    )
    pair_n, token_n = np.divmod(codes, vocabulary)
    rarity_v = np.log((len(queries) + 1) / (np.bincount(token_n, minlength=vocabulary) + 1))
    weight_n = (1 + np.log(counts)) * rarity_v[token_n]
    length_p = np.sqrt(np.bincount(pair_n, weight_n**2, minlength=len(queries)))
    weight_n /= np.maximum(length_p, np.finfo(np.float64).tiny)[pair_n]
    parts = []
    for first in range(0, len(queries), PAIRS_AT_ONCE):
        size = min(PAIRS_AT_ONCE, len(queries) - first)
        here = slice(*np.searchsorted(pair_n, [first, first + size]))
        places = torch.from_numpy(np.stack([pair_n[here] - first, token_n[here]]))
        parts.append(
            torch.sparse_coo_tensor(
                places, torch.from_numpy(weight_n[here]), (size, vocabulary), check_invariants=False
            )
        )
    return parts


def _twice(parts: Sequence[torch.Tensor], basis_vq: torch.Tensor) -> torch.Tensor:
    """What the table times its transpose makes of directions [v, q]."""
    return sum(
        (torch.sparse.mm(part.t(), torch.sparse.mm(part, basis_vq)) for part in parts), torch.zeros_like(basis_vq)
    )


def _there(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whether each token has any weight in some pair [v, 1]: one that stands in every pair has none."""
    sums_v1 = [torch.sparse.mm(part.t(), torch.ones(len(part), 1, dtype=part.dtype)) for part in parts]
    return torch.stack(sums_v1).sum(dim=0) > 0
