"""Long texts: cut, or taken in parts whose vectors are averaged; and tokenized no further than they are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_ray.data.tokens import store
from f2llm_ray.data.tokens.store import HEAD_CHARS, MARGIN, cut, tokenize
from f2llm_ray.data.tokens.tokenizer import load_tokenizer
from f2llm_ray.serve.pieces import chunks, pieces_of
from tests.tiny import LINES, tiny_model

NONE = np.array([], dtype=np.uint32)
EOS = 9


@settings(max_examples=60)
@given(length=st.integers(0, 200), most=st.integers(6, 40), before=st.integers(0, 2), prompt=st.integers(0, 2))
def test_parts_hold_the_text_once_and_each_has_its_lead(length: int, most: int, before: int, prompt: int) -> None:
    lead = np.array([7] * before + [8] * prompt, dtype=np.uint32)
    body = np.arange(100, 100 + length, dtype=np.uint32)
    ids = np.concatenate([lead, body, np.array([EOS], dtype=np.uint32)])
    parts = chunks(ids, most, prefix=lead[:before], prompt=lead[before:])
    assert all(len(part) <= most for part in parts)
    assert all(part[: len(lead)].tolist() == lead.tolist() and part[-1] == EOS for part in parts)
    held = np.concatenate([part[len(lead) : -1] for part in parts])
    assert held.tolist() == body.tolist()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len(parts) == max(1, -(-length // (most - len(lead) - 1))) or len(ids) <= most


def test_a_mean_by_tokens_is_that_of_a_slow_reference() -> None:
    generator = np.random.default_rng(0)
    ids = [np.append(np.arange(length), EOS).astype(np.uint32) for length in (3, 50, 9, 23)]
    pieces = pieces_of(ids, "chunk", 10, prefix=NONE, prompt=NONE)
    assert (pieces.truncated, pieces.chunked) == (0, 2)
    vectors = generator.standard_normal((len(pieces.tokens), 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = pieces.joined(vectors.astype(np.float32))
    start = 0
    for row, count in zip(found, pieces.counts, strict=True):
        own, weights = (
            vectors[start : start + count],
            [len(piece) for piece in pieces.tokens[start : start + count]],
        )
        mean = sum(weight * vector for weight, vector in zip(weights, own, strict=True))
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)
        start += count
    assert start == len(vectors)


def test_cutting_keeps_eos_and_is_counted() -> None:
    ids = [np.append(np.arange(length), EOS).astype(np.uint32) for length in (3, 50)]
    pieces = pieces_of(ids, "truncate", 10, prefix=NONE, prompt=NONE)
    assert [piece.tolist() for piece in pieces.tokens] == [[0, 1, 2, EOS], [*range(9), EOS]]
    assert (pieces.truncated, pieces.chunked, pieces.size) == (1, 0, 14)


@pytest.mark.parametrize("text", [" ".join(LINES) + " ", "猫が窓のそばで", "a", " ", "\n\n\t", "é👩‍👩‍👧‍👦"])
def test_a_very_long_text_is_cut_as_if_all_of_it_were_tokenized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    tokenizer = load_tokenizer(tiny_model(tmp_path / "model"))
    long = text * (40 * HEAD_CHARS * (16 + MARGIN) // len(text))
    (whole,) = tokenize(tokenizer, [long])
    found = tokenize(tokenizer, ["short", long, text], 16)
    np.testing.assert_array_equal(found[1], cut(whole, 16))
    assert [len(ids) <= 16 for ids in found] == [True] * 3
    seen: list[int] = []
    head = store._head  # noqa: SLF001

    class Counting:
        def encode(self, part: str) -> object:
            seen.append(len(part))
            return tokenizer.encode(part)

    monkeypatch.setattr(store, "_head", head)
    store._head(Counting(), long, 16)  # type: ignore[arg-type]  # noqa: SLF001
    assert sum(seen) < len(long) / 10
