"""Languages by how much text of theirs was trained on: high, mid and low resource, and none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LanguageScores = Mapping[str, Mapping[str, Any]]
"""Metrics by language."""

CLASSES = ("high", "mid", "low")


@dataclass(frozen=True)
class Group:
    """A resource class of a set's languages."""

    name: str
    languages: tuple[str, ...]

    def mean(self, scores: LanguageScores, metric: str) -> float | None:
        """The mean over these languages, each counting once; None where one of them was not measured."""
        values = [(scores.get(language) or {}).get(metric) for language in self.languages]
        known = [float(value) for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    def rows(self, trained: Mapping[str, int]) -> str:
        """The least and most training rows of these languages."""
        numbers = sorted(trained.get(language, 0) for language in self.languages)
        return f"{numbers[0]:,}" if numbers[0] == numbers[-1] else f"{numbers[0]:,} to {numbers[-1]:,}"


def by_resources(scores: LanguageScores, trained: Mapping[str, int]) -> list[Group]:
    """The classes that a set's languages fall into, richest first; empty ones are left out.

    The languages that were trained on are put into thirds by their training rows, ties in the order of their
    names; "none" are those that never were.
    """
    known = sorted(
        (language for language in scores if trained.get(language)), key=lambda name: (-trained[name], name)
    )
    names: dict[str, list[str]] = {name: [] for name in (*CLASSES, "none")}
    for place, language in enumerate(known):
        names[CLASSES[place * len(CLASSES) // len(known)]].append(language)
    names["none"] = sorted(set(scores) - set(known))
    return [Group(name, tuple(languages)) for name, languages in names.items() if languages]
