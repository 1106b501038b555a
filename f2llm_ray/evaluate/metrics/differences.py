"""Models beside the first one, set by set: what differs, how sure that is, and in which languages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from f2llm_ray.evaluate.metrics.intervals import Difference
from f2llm_ray.evaluate.metrics.summary import compare
from f2llm_ray.evaluate.tasks.task import Kind

FIXED = ("id", "language", "target")
NAMED = 5
"""Languages that the table names at each end."""


def full_dim(units: pa.Table) -> int:
    """The largest dim that a model was measured at."""
    return max(int(name) for name in units.column_names if name not in FIXED)


def differences(kinds: Mapping[str, Kind], units: Mapping[str, Mapping[str, pa.Table]]) -> list[dict[str, Any]]:
    """Each further model against the first, at the full dim of each, by paired bootstrap.

    Args:
        kinds: of each set.
        units: by model, then by set, what measuring gave for each query, text or pair (`Measured.units`).

    Returns:
        A row per set and further model, as JSON values: `difference` is the model's main metric minus the first
        one's, `low` and `high` its 95 % interval, `p` two-sided; `macro` the same of the mean over languages;
        `wins` and `losses` the languages whose interval leaves out 0; `languages` all of them.

    Raises:
        ValueError: a set has other units for two models.
    """
    first, *others = units
    rows = []
    for name, kind in kinds.items():
        base = units[first][name]
        for model in others:
            table = units[model][name]
            found = compare(kind, table, base, (full_dim(table), full_dim(base)))
            rows.append(
                {
                    "set": name,
                    "model": model,
                    "against": first,
                    "dims": [full_dim(table), full_dim(base)],
                    **_told(found.all),
                    "macro": _told(found.macro),
                    "wins": sorted(language for language, gap in found.languages.items() if gap.low > 0),
                    "losses": sorted(language for language, gap in found.languages.items() if gap.high < 0),
                    "languages": {language: _told(gap) for language, gap in sorted(found.languages.items())},
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a terminal."""
    lines = []
    for row in rows:
        lines.append(
            f"{row['set']}: {row['model']} minus {row['against']} {row['difference']:+.4f} "
            f"[{row['low']:+.4f}, {row['high']:+.4f}], p {row['p']:.3f}; macro {row['macro']['difference']:+.4f}; "
            f"better in {len(row['wins'])}, worse in {len(row['losses'])} of {len(row['languages'])} languages"
        )
        for word, languages in (("better", row["wins"]), ("worse", row["losses"])):
            largest = sorted(languages, key=lambda language: -abs(row["languages"][language]["difference"]))[
                :NAMED
            ]
            if largest:
                gaps = (f"{language} {row['languages'][language]['difference']:+.3f}" for language in largest)
                lines.append(f"  {word} most in {', '.join(gaps)}")
    return "\n".join(lines)


def _told(gap: Difference) -> dict[str, float]:
    return {name: round(value, 6) for name, value in gap._asdict().items()}
