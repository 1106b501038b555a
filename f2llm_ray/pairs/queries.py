"""Answers into queries: what is read of an answer, and which queries are kept."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from f2llm_ray.data.clean import normalize
from f2llm_ray.data.near.shingles import shingle

LONGEST = 300
"""Characters of the longest query."""
RUN = 5
"""Words that stand in the passage in the same order count as copied; characters in scripts without spaces."""
COPIED = 0.6
"""Share of a query's runs of `RUN` words from which the query is a copy."""
KEYS = ("query", "question", "title", "text")
"""Where models that write objects in place of strings put the text."""
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)


class NoListError(ValueError):
    """An answer of which no queries can be read; the text is the reason."""


@dataclass(frozen=True)
class Query:
    """A query that is kept."""

    request: int
    """Number of what was asked."""
    text: str


def parsed(answer: str) -> list[str]:
    """The queries of an answer: those of the first JSON list in it that holds texts, or objects with one.

    What stands around the list is passed over, as are thoughts and fences of code.

    Raises:
        NoListError: there is none.
    """
    answer = _THOUGHT.sub("", answer)
    if not answer.strip():
        raise NoListError("an empty answer")
    decoder, found_list = json.JSONDecoder(), False
    at = answer.find("[")
    while at >= 0:
        try:
            found, end = decoder.raw_decode(answer, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            found_list = True
            texts = [_text(entry) for entry in found]
            if texts and all(text is not None for text in texts):
                return [text for text in texts if text is not None]
        at = answer.find("[", end)
    raise NoListError("a list of something else than texts" if found_list else "no JSON list")


def _text(entry: Any) -> str | None:
    if isinstance(entry, dict):
        entry = next((entry[key] for key in KEYS if key in entry), None)
    return entry if isinstance(entry, str) and _is_unicode(entry) else None


def _is_unicode(text: str) -> bool:
    """Whether a text is valid; a JSON escape can hold half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


class Sieve:
    """Keeps the queries of answers that come in their order, and counts all others by reason."""

    def __init__(self) -> None:
        self.kept: list[Query] = []
        self.dropped: Counter[str] = Counter()
        self._seen: set[str] = set()

    def add(self, request: int, queries: Sequence[str], passage: str, most: int) -> None:
        """Takes the queries of one answer.

        Args:
            request: number of what was asked.
            queries: as the answer has them.
            passage: what they are for.
            most: how many were asked for.
        """
        texts, kept = [normalize(text) for text in queries], 0
        for text, share in zip(texts, copied_shares(texts, passage), strict=True):
            reason = self._fault(text, share, passage)
            if reason is None and kept == most:
                reason = "more than were asked for"
            if reason is None:
                self._seen.add(text.casefold())
                self.kept.append(Query(request, text))
                kept += 1
            else:
                self.dropped[reason] += 1

    def _fault(self, text: str, share: float, passage: str) -> str | None:
        if not text:
            return "empty"
        if len(text) > LONGEST:
            return f"longer than {LONGEST} characters"
        if share >= COPIED or text.casefold() == passage.casefold():
            return "copied from the passage"
        return "the same as an earlier query" if text.casefold() in self._seen else None


def copied_shares(queries: Iterable[str], passage: str) -> list[float]:
    """The share of each query's runs of `RUN` words that the passage holds; 0 for a query of fewer words."""
    texts = list(queries)
    if not texts:
        return []
    found = shingle([passage, *texts], RUN)
    own = found.hashes[: found.starts[1]]
    return [
        float(np.isin(found.hashes[found.starts[text] : found.starts[text + 1]], own).mean())
        if found.tokens[text] >= RUN
        else 0.0
        for text in range(1, len(texts) + 1)
    ]
