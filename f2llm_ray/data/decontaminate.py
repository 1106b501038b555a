"""Decontamination: training rows that hold a text of an evaluation set are tagged.

Shapes: D texts of the sets, G their n-grams, T training texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from f2llm_ray.data.clean import normalize
from f2llm_ray.data.near.shingles import Hashes, shingle
from f2llm_ray.data.ragged import Ints, ranges
from f2llm_ray.data.schema import with_column
from f2llm_ray.data.settings import Decontamination


class Screened(NamedTuple):
    """The texts of a task that must not be trained on."""

    asked: Sequence[str]
    """Queries and labelled texts: also the short ones are looked for."""
    answers: Sequence[str]
    """What is to be found; a short one is no secret."""


@dataclass(frozen=True)
class Screen:
    """The texts of evaluation sets by their n-grams: an inverted index, which counts every overlap exactly."""

    settings: Decontamination
    sets: tuple[str, ...]
    set_of: Ints
    """The set of each text [D]."""
    sizes: Ints
    """Distinct n-grams of each text [D]."""
    ngrams: Hashes
    """All n-grams of all texts, sorted [G]."""
    text_of: Ints
    """The text that each is of [G]."""

    def find(self, texts: Sequence[str]) -> Ints:
        """The first set that each training text holds a text of [T], -1 for none."""
        owner, held = self.held(texts)
        found = np.full(len(texts), len(self.sets))
        np.minimum.at(found, owner, self.set_of[held])
        return np.where(found < len(self.sets), found, -1)

    def held(self, texts: Sequence[str]) -> tuple[Ints, Ints]:
        """Each pair of a training text and a text of a set that it holds, as their places."""
        hashes, lengths = shingle(texts, self.settings.ngram).distinct()
        owner = np.repeat(np.arange(len(texts)), lengths)
        first = np.searchsorted(self.ngrams, hashes, side="left")
        count = np.searchsorted(self.ngrams, hashes, side="right") - first
        pairs = np.repeat(owner, count) * len(self.sizes) + self.text_of[ranges(first, count)]
        pairs, common = np.unique(pairs, return_counts=True)
        held = pairs[common >= self.settings.overlap * self.sizes[pairs % len(self.sizes)]]
        return held // len(self.sizes), held % len(self.sizes)


def make_screen(sets: Mapping[str, Screened], settings: Decontamination) -> Screen | None:
    """Indexes what sets, by name, ask, and their answers of an n-gram's length; None when there is no text."""
    set_of: list[int] = []
    texts: list[str] = []
    for place, (asked, answers) in enumerate(sets.values()):
        queries = [normalize(text) for text in asked]
        passages = [normalize(text) for text in answers] if settings.passages else []
        long = shingle(passages, settings.ngram).tokens >= settings.ngram
        kept = [*queries, *(text for text, enough in zip(passages, long, strict=True) if enough)]
        set_of += [place] * len(kept)
        texts += kept
    if not texts:
        return None
    hashes, sizes = shingle(texts, settings.ngram).distinct()
    order = np.argsort(hashes, kind="stable")
    text_of = np.repeat(np.arange(len(texts)), sizes)[order]
    return Screen(settings, tuple(sets), np.array(set_of), sizes, hashes[order], text_of)


def decontaminate(rows: pa.Table, screen: Screen | None) -> pa.Table:
    """Tags rows with "decontaminate: <set>" whose query or passage holds a text of the set."""
    if screen is None or not len(rows):
        return rows
    query, passage = (screen.find(rows[name].to_pylist()) for name in ("query", "passage"))
    found = np.where(query >= 0, query, passage)
    drops = [
        drop or (f"decontaminate: {screen.sets[place]}" if place >= 0 else None)
        for drop, place in zip(rows["drop"].to_pylist(), found.tolist(), strict=True)
    ]
    return with_column(rows, "drop", drops)
