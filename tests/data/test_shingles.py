"""Shingles, signatures and bands: what reads the same is the same, and chances follow the S-curve."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from f2llm_ray.data.near.minhash import PRESETS, band_keys, signatures
from f2llm_ray.data.near.shingle_store import jaccards
from f2llm_ray.data.near.shingles import Hashes, shingle


def sets(texts: list[str], size: int) -> list[set[int]]:
    hashes, lengths = shingle(texts, size).distinct()
    return [set(part.tolist()) for part in np.split(hashes, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The cat's hat, 2 times!", ["the", "cat", "s", "hat", "2", "times"]),
        ("猫が好き。", list("猫が好き")),
        ("ภาษาไทย", list("ภาษาไทย")),
        ("한국어 문장", ["한국어", "문장"]),
        ("זה משפט", ["זה", "משפט"]),
        ("क्षत्रिय हिन्दी", ["क्षत्रिय", "हिन्दी"]),
        ("Python是语言", ["python", "是", "语", "言"]),
        ("👩‍💻👍🏽 ok", ["👩", "💻", "👍", "🏽", "ok"]),
        ("a+b", ["a", "+", "b"]),
        ("...", []),
        ("", []),
    ],
)
def test_tokens_are_words_or_characters_by_script(text: str, tokens: list[str]) -> None:
    found = shingle([text], 1)
    assert found.tokens.tolist() == [len(tokens)]
    assert len(sets([text], 1)[0]) == max(len(set(tokens)), 1)
    if tokens:
        assert sets([text], 1) == sets([" ".join(tokens)], 1)


@given(st.lists(st.text(), min_size=1, max_size=20), st.integers(1, 6))
def test_a_text_is_shingled_alone_as_in_any_batch(texts: list[str], size: int) -> None:
    together = shingle(texts, size)
    for number, text in enumerate(texts):
        alone = shingle([text], size)
        assert (
            together.hashes[together.starts[number] : together.starts[number + 1]].tolist()
            == alone.hashes.tolist()
        )
        assert len(alone.hashes) == max(alone.tokens[0] - size + 1, 1)


def test_only_what_reads_the_same_is_the_same() -> None:
    one, other, longer, order = sets(["Save file", "save  FILE.", "save file as", "file save"], 5)
    assert one == other
    assert one.isdisjoint(longer)
    assert one.isdisjoint(order)
    nothing = sets(["", "...", "!!"], 5)
    assert len(nothing[0] | nothing[1] | nothing[2]) == 3, "texts without tokens equal only themselves"


def test_a_text_of_a_megabyte() -> None:
    words = "".join(f"word{n % 5000} " for n in range(120_000))
    assert len(words) > 1_000_000
    found = shingle([words, "short"], 5)
    signature = signatures(found, 16)
    assert (signature == np.concatenate([signatures(shingle([t], 5), 16) for t in (words, "short")])).all()


def slow_signature(hashes: Hashes, permutations: int) -> list[int]:
    from f2llm_ray.data.schema import rng

    generator = rng("minhash", permutations)
    a = generator.integers(0, 2**64, size=permutations, dtype=np.uint64) | np.uint64(1)
    b = generator.integers(0, 2**64, size=permutations, dtype=np.uint64)
    return [min((int(h) * int(x) + int(y)) % 2**64 for h in hashes) >> 32 for x, y in zip(a, b, strict=True)]


def test_signatures_equal_the_slow_ones() -> None:
    generator = random.Random(0)
    texts = [" ".join(generator.choices("abcdefgh", k=generator.randint(1, 40))) for _ in range(50)]
    found = shingle(texts, 3)
    fast = signatures(found, 24)
    for number in range(len(texts)):
        hashes = found.hashes[found.starts[number] : found.starts[number + 1]]
        assert fast[number].tolist() == slow_signature(hashes, 24)


def pair(jaccard: float, size: int, generator: random.Random) -> tuple[str, str]:
    """Two texts of distinct words that share this Jaccard of words."""
    common = round(2 * size * jaccard / (1 + jaccard))
    word = iter(str(n) for n in generator.sample(range(10**9), 2 * size))
    shared = [next(word) for _ in range(common)]
    return tuple(" ".join([*shared, *(next(word) for _ in range(size - common))]) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("preset", ["loose", "standard", "strict"])
@pytest.mark.parametrize("jaccard", [0.4, 0.7, 0.85])
def test_candidates_follow_the_s_curve(preset: str, jaccard: float) -> None:
    lsh, generator, count = PRESETS[preset], random.Random(1), 1500  # type: ignore[index]
    texts = [text for _ in range(count) for text in pair(jaccard, 100, generator)]
    found = shingle(texts, 1)
    hashes, lengths = found.distinct()
    ends = np.split(hashes, np.cumsum(lengths)[:-1])
    real = np.mean(
        [len(np.intersect1d(a, b)) / len(np.union1d(a, b)) for a, b in zip(ends[::2], ends[1::2], strict=True)]
    )
    keys = band_keys(signatures(found, lsh.bands * lsh.rows), lsh)
    share = (keys[::2] == keys[1::2]).any(axis=1).mean()
    expected = lsh.probability(float(real))
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / count) + 0.005


def test_jaccards_equal_those_of_python_sets() -> None:
    generator = random.Random(3)
    one = [" ".join(generator.choices("abcdef", k=generator.randint(1, 12))) for _ in range(60)]
    other = [" ".join(generator.choices("abcdef", k=generator.randint(1, 12))) for _ in range(60)]
    expected = [len(a & b) / len(a | b) for a, b in zip(sets(one, 2), sets(other, 2), strict=True)]
    np.testing.assert_allclose(jaccards(shingle(one, 2).distinct(), shingle(other, 2).distinct()), expected)
