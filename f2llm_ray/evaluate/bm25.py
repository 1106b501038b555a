"""BM25, the search by words that every model is held against, by the package bm25s.

Lucene's variant with k1 1.5 and b 0.75 (Kamphuis et al. 2020, "Which BM25 do you mean?"). A passage that has no
word of the query is no result. Equal scores stand in the order of the corpus, so the same texts give the same
results.

Shapes: q queries, c passages of the corpus, k results per query.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from f2llm_ray.base import formatting
from f2llm_ray.base.optional import require
from f2llm_ray.data.near.shingles import UNSPACED
from f2llm_ray.data.ragged import Ints

K1, B = 1.5, 0.75
MANY = 200_000
"""Passages from which on it is said what the index takes."""
# By characters, of which a passage has more or fewer; python -m benchmarks.bm25.
SECONDS_PER_CHARACTER, BYTES_PER_CHARACTER = 0.34e-6, 5.9
_HANGUL = ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF))
"""Korean has spaces, but glues particles to its words; Lucene's analyzer for CJK takes bigrams of it as well."""


def words(text: str) -> list[str]:
    """What BM25 counts of a text: its words, or overlapping pairs of characters in scripts without spaces.

    Case and compatibility forms are folded (NFKC). Letters, marks and digits make words, anything else separates.
    Of Han, kana, Hangul, Thai, Lao, Khmer, Burmese and their like each run of characters gives its bigrams, as
    Lucene's CJKBigramFilter has it; a character by itself stays one.
    """
    found: list[str] = []
    for word, unspaced in _runs().findall(unicodedata.normalize("NFKC", text).casefold()):
        if word:
            found.append(word)
        elif len(unspaced) == 1:
            found.append(unspaced)
        else:
            found += map("".join, pairwise(unspaced))
    return found


def top_passages(
    queries: Sequence[str], passages: Sequence[str], *, k: int, left_out_q: Ints | None = None
) -> Ints:
    """Corpus positions of the k best passages of each query by BM25, best first.

    Args:
        queries: texts.
        passages: texts; the index of them is in memory.
        k: results per query.
        left_out_q: a corpus position that is no result of each query, -1 for none.

    Returns:
        [q, k]; -1 at the end of a row that has fewer.

    Raises:
        DataError: bm25s is not installed.
    """
    package = require("bm25s", extra="eval")
    number_of: dict[str, int] = {}
    counted = [[number_of.setdefault(word, len(number_of)) for word in words(text)] for text in passages]
    top_qk = np.full((len(queries), k), -1, dtype=np.int64)
    if not number_of:
        return top_qk
    index = package.BM25(k1=K1, b=B, method="lucene")
    index.index((counted, number_of), show_progress=False)
    del counted
    for place, query in enumerate(queries):
        known = [number_of[word] for word in words(query) if word in number_of]
        if not known:
            continue
        score_c = index.get_scores_from_ids(known)
        if left_out_q is not None and left_out_q[place] >= 0:
            score_c[left_out_q[place]] = 0
        best = _best(score_c, k)
        top_qk[place, : len(best)] = best
    return top_qk


def index_cost(passages: int, characters: int) -> str | None:
    """What the index of so many passages takes, in words; None for few, of which it is not worth a line."""
    if passages < MANY:
        return None
    memory = formatting.byte_size(BYTES_PER_CHARACTER * characters)
    seconds = formatting.duration(SECONDS_PER_CHARACTER * characters)
    return f"{passages:,} passages takes about {memory} of memory and {seconds} of one core"


def _best(score_c: np.ndarray[Any, Any], k: int) -> Ints:
    """Positions of the k largest scores above 0, falling; equal ones in their order."""
    some = np.flatnonzero(score_c > 0)
    if len(some) > k:
        floor = np.partition(score_c[some], -k)[-k]
        some = some[score_c[some] >= floor]
    best: Ints = some[np.argsort(-score_c[some], kind="stable")[:k]]
    return best


@lru_cache(maxsize=1)
def _runs() -> re.Pattern[str]:
    """Finds words (first group), and runs of a script without spaces (second)."""
    unspaced = {point for first, last in (*UNSPACED, *_HANGUL) for point in range(first, last + 1)}
    inside = [point for point in range(0x40000) if unicodedata.category(chr(point))[0] in "LMN"]
    spaced, alone = (_class(p for p in inside if (p in unspaced) is without) for without in (False, True))
    return re.compile(f"([{spaced}]+)|([{alone}]+)")


def _class(points: Iterable[int]) -> str:
    """Ascending code points as ranges of a regular expression's class."""
    ranges: list[list[int]] = []
    for point in points:
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)
