"""Token vectors of pairs: those of a full decomposition, near each other for words that answer each other."""

from __future__ import annotations

import numpy as np
import torch

from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.model.pair_embeddings import SIZE, pair_embeddings, put_pair_embeddings
from f2llm_ray.model.sizes import Shape, random_backbone

WORDS = 40
"""Of each of two languages: word i of the first is word WORDS + i of the second."""
END, UNSEEN = 2 * WORDS, 2 * WORDS + 1
VOCABULARY = UNSEEN + 1


def translated(pairs: int, seed: int) -> tuple[list[Tokens], list[Tokens]]:
    """Texts of three to seven words, and all but one of them in another language and order; END is last."""
    generator = np.random.default_rng(seed)
    queries, passages = [], []
    for _ in range(pairs):
        words = generator.integers(0, WORDS, generator.integers(3, 8))
        queries.append(np.append(words, END).astype(np.uint32))
        passages.append(np.append(generator.permutation(words)[1:] + WORDS, END).astype(np.uint32))
    return queries, passages


def slow(queries: list[Tokens], passages: list[Tokens], dims: int) -> np.ndarray:
    """By a dense table and its whole decomposition."""
    table = np.zeros((VOCABULARY, len(queries)))
    for column, texts in enumerate(zip(queries, passages, strict=True)):
        for token in np.concatenate(texts):
            table[token, column] += 1
    rarity = np.log((len(queries) + 1) / ((table > 0).sum(axis=1) + 1))
    table = np.where(table > 0, 1 + np.log(np.maximum(table, 1)), 0) * rarity[:, None]
    table /= np.linalg.norm(table, axis=0)
    left = np.linalg.svd(table, full_matrices=False)[0][:, :dims]
    left[(table == 0).all(axis=1)] = 0
    return left / np.maximum(np.linalg.norm(left, axis=1, keepdims=True), 1e-300)


def test_they_are_those_of_the_whole_decomposition() -> None:
    queries, passages = translated(300, seed=0)
    found = pair_embeddings(queries, passages, VOCABULARY, VOCABULARY - 10, seed=3)
    assert found.dtype == torch.float64
    # The rank is 80 of 82: END stands in every pair, UNSEEN in none.
    expected = slow(queries, passages, 72)
    np.testing.assert_allclose((found @ found.T).numpy(), expected @ expected.T, atol=1e-6)
    few = pair_embeddings(queries[:3], passages[:3], VOCABULARY, 20, seed=3)
    assert few.isfinite().all()
    assert not few[:, 3:].any(), "three pairs have three directions"


def test_words_lie_nearest_to_their_translations() -> None:
    queries, passages = translated(2000, seed=1)
    found = pair_embeddings(queries, passages, VOCABULARY, WORDS, seed=0)
    nearest = (found[:WORDS] @ found[WORDS : 2 * WORDS].T).argmax(dim=1)
    assert nearest.tolist() == list(range(WORDS))


def test_the_same_whatever_the_threads_and_the_parts() -> None:
    queries, passages = translated(500, seed=2)
    found = pair_embeddings(queries, passages, VOCABULARY, 16, seed=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        again = pair_embeddings(queries, passages, VOCABULARY, 16, seed=0)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found, again)


def test_a_model_gets_them_all_of_one_length() -> None:
    queries, passages = translated(300, seed=0)
    shape = Shape(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=16)
    backbone = random_backbone(shape, VOCABULARY, 0)
    random = backbone.get_input_embeddings().weight.detach().clone()
    put_pair_embeddings(backbone, queries, passages, seed=0)
    found = backbone.get_input_embeddings().weight.detach()
    expected = pair_embeddings(queries, passages, VOCABULARY, 16, seed=0).float()
    torch.testing.assert_close(found[:END] / (4 * SIZE), expected[:END])
    torch.testing.assert_close(found.square().mean(dim=1), torch.full((VOCABULARY,), SIZE**2))
    for token in (END, UNSEEN):
        torch.testing.assert_close(
            torch.nn.functional.cosine_similarity(found[token], random[token], dim=0), torch.tensor(1.0)
        )
