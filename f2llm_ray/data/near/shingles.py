"""Shingles: a text as a list of hashes of its runs of tokens, for near-duplicates and overlap with test sets.

A token is a word where the script puts spaces between words, and one character where it does not (Han, kana, Thai,
Lao, Khmer, Burmese, ...) or where a character is a symbol or emoji. Case is folded; punctuation and spaces only
separate. All texts of a batch are worked on at once, on their code points.

Shapes: T texts, C code points kept, W tokens, S shingles.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from f2llm_ray.data.ragged import Ints, ranges
from f2llm_ray.data.schema import text_key

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Ragged = tuple[Hashes, Ints]
"""Lists end to end [S], and the length of each [n]."""

SEPARATOR, WORD, ALONE = range(3)
"""What a code point is: between tokens, part of a word, or a token by itself."""

# Blocks of scripts written without spaces between words: Thai and Lao, Myanmar, Khmer, New Tai Lue to Tai Tham,
# kana and Bopomofo to the CJK ideographs, Yi, Javanese, Myanmar extended to Tai Viet, CJK compatibility,
# ideographs beyond the first plane. Tibetan is not among them: its tsheg separates syllables. Hangul has spaces.
UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x1AAF), (0x2E80, 0x2FDF), (0x3005, 0x3007),
    (0x3040, 0x312F), (0x31A0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0xA4CF), (0xA980, 0xA9DF), (0xA9E0, 0xAADF),
    (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x1AFF0, 0x1B16F), (0x20000, 0x3FFFF),
)  # fmt: skip
_VARIATION_SELECTORS = (0xFE00, 0xFE0F)


@dataclass(frozen=True)
class Shingles:
    """The shingles of a batch of texts."""

    hashes: Hashes
    """[S], text after text."""
    starts: Ints
    """[T + 1]: those of text t are hashes[starts[t] : starts[t + 1]], at least one."""
    tokens: Ints
    """[T]: the tokens of each text."""

    def distinct(self) -> Ragged:
        """The distinct shingles of each text, sorted."""
        return distinct(self.hashes, np.diff(self.starts))

    def of(self, texts: Ints) -> Ragged:
        """The distinct shingles of some of the texts [n], sorted."""
        lengths = self.starts[texts + 1] - self.starts[texts]
        return distinct(self.hashes[ranges(self.starts[texts], lengths)], lengths)


def distinct(hashes: Hashes, lengths: Ints) -> Ragged:
    """Lists end to end as sets: each sorted, without repetition."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((hashes, owner))
    owner, hashes = owner[order], hashes[order]
    new = np.append(True, (owner[1:] != owner[:-1]) | (hashes[1:] != hashes[:-1]))[: len(hashes)]
    return hashes[new], np.bincount(owner[new], minlength=len(lengths))


def shingle(texts: Sequence[str], size: int) -> Shingles:
    """Hashes every run of `size` tokens of each text.

    A text of fewer tokens has one shingle, of all of them; a text without any (only punctuation, or empty) has one
    of its characters as they are. So every text is comparable, and a short one equals only those that read the
    same.
    """
    token_hashes, tokens = _tokens(texts)
    # Short texts are filled up with a token that no text has, to the length of one shingle.
    lengths = np.maximum(tokens, size)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    filled = np.zeros(int(starts[-1]), np.uint64)
    filled[ranges(starts[:-1], tokens)] = token_hashes
    for text in np.flatnonzero(tokens == 0).tolist():
        filled[starts[text]] = np.frombuffer(text_key(texts[text])[:8], "<u8")[0]
    runs = filled * _odd(1)
    for place in range(1, size):
        runs[:-place] += filled[place:] * _odd(2 * place + 1)
    count = lengths - size + 1
    hashes = mixed(runs[ranges(starts[:-1], count)])
    return Shingles(hashes, np.concatenate([[0], np.cumsum(count)]), tokens)


def _tokens(texts: Sequence[str]) -> tuple[Hashes, Ints]:
    """Hash of each token [W], text after text, and the number of tokens of each text [T]."""
    folded = [text.casefold() for text in texts]
    points = np.frombuffer("".join(folded).encode("utf-32-le", "surrogatepass"), "<u4")
    owner = np.repeat(np.arange(len(folded)), [len(text) for text in folded])
    kind = _kinds()[points]
    kept = np.flatnonzero(kind != SEPARATOR)
    if not len(kept):
        return np.empty(0, np.uint64), np.zeros(len(folded), np.int64)
    apart = (np.diff(kept) > 1) | (np.diff(owner[kept]) > 0)
    new = np.concatenate([[True], apart | (kind[kept[1:]] == ALONE) | (kind[kept[:-1]] == ALONE)])
    first = np.flatnonzero(new)
    place = np.arange(len(kept)) - np.repeat(first, np.diff(np.append(first, len(kept))))
    letters = mixed(points[kept].astype(np.uint64) * _odd(0) + place.astype(np.uint64))
    return np.add.reduceat(letters, first), np.bincount(owner[kept[first]], minlength=len(folded))


def mixed(values: Hashes) -> Hashes:
    """Values of any shape with their bits stirred, by splitmix64's finaliser: each bit depends on all."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def _odd(number: int) -> np.uint64:
    """The number-th of a fixed row of odd multipliers."""
    golden = 0x9E3779B97F4A7C15
    return np.uint64((golden * (2 * number + 1)) % 2**64 | 1)


@lru_cache(maxsize=1)
def _kinds() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The kind of every code point; made once per process, in 40 ms."""
    kinds = np.full(0x110000, SEPARATOR, np.uint8)
    for point in range(0x40000):  # above are only tags, selectors and private use
        category = unicodedata.category(chr(point))
        if category[0] in "LMN":
            kinds[point] = WORD
        elif category in {"So", "Sm", "Sc"} or 0x1F3FB <= point <= 0x1F3FF:
            kinds[point] = ALONE
    for first, last in UNSPACED:
        block = kinds[first : last + 1]
        block[block == WORD] = ALONE
    kinds[_VARIATION_SELECTORS[0] : _VARIATION_SELECTORS[1] + 1] = SEPARATOR
    return kinds
