"""How far models are from the first one, set by set: the difference, its interval, and the same by language.

Shapes: n units, l languages, r resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from f2llm_ray.evaluate.metrics.intervals import Difference, Values, difference
from f2llm_ray.evaluate.metrics.scores import LanguageGroups, columns, dims_of, rounded, same_units
from f2llm_ray.evaluate.tasks.registry import main_metric

NAMED = 5
"""Languages that the table names at each end."""


class Comparison(NamedTuple):
    """Differences of the main metric between two models on one task."""

    all: Difference
    """Over all units."""
    macro: Difference
    """Of the mean over languages."""
    languages: dict[str, Difference]


def compare(kind: str, a: pa.Table, b: pa.Table, dims: tuple[int, int]) -> Comparison:
    """Compares two models, each at one of its dims, by the units that measuring a task returned for them.

    Raises:
        ValueError: they are not the same units.
    """
    if not same_units(a, b):
        raise ValueError(f"compare: {len(a)} units against {len(b)}, and they are not the same ones")
    (target_n, value_n1), (_, other_n1) = columns(a, dims[:1]), columns(b, dims[1:])
    groups = LanguageGroups(a["language"].to_pylist())
    scored = main_metric(kind), target_n, np.column_stack([value_n1, other_n1])
    point_l2, samples_lr2 = groups.scores(*scored), groups.resampled(*scored)
    even_l = np.full(len(point_l2), 1 / len(point_l2))
    overall, macro = (
        _difference(share_l @ point_l2, np.tensordot(share_l, samples_lr2, 1))
        for share_l in (groups.weight_l, even_l)
    )
    languages = map(_difference, point_l2, samples_lr2)
    return Comparison(overall, macro, dict(zip(groups.places, languages, strict=True)))


def differences(kinds: Mapping[str, str], units: Mapping[str, Mapping[str, pa.Table]]) -> list[dict[str, Any]]:
    """Each further model against the first, at the full dim of each, by paired bootstrap.

    Args:
        kinds: of each set.
        units: by model, then by set, the table that measuring returned (`Measured.units`).

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
            dims = dims_of(table)[0], dims_of(base)[0]
            found = compare(kind, table, base, dims)
            rows.append(
                {
                    "set": name,
                    "model": model,
                    "against": first,
                    "dims": list(dims),
                    **_as_json(found.all),
                    "macro": _as_json(found.macro),
                    "wins": sorted(language for language, gap in found.languages.items() if gap.low > 0),
                    "losses": sorted(language for language, gap in found.languages.items() if gap.high < 0),
                    "languages": {language: _as_json(gap) for language, gap in sorted(found.languages.items())},
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
        gap_of = {language: gap["difference"] for language, gap in row["languages"].items()}
        for word, languages in (("better", row["wins"]), ("worse", row["losses"])):
            largest = sorted((-abs(gap_of[language]), language) for language in languages)[:NAMED]
            if largest:
                lines.append(f"  {word} most in {', '.join(f'{name} {gap_of[name]:+.3f}' for _, name in largest)}")
    return "\n".join(lines)


def _difference(point_2: Values, sample_r2: Values) -> Difference:
    return difference(float(point_2[0]), float(point_2[1]), sample_r2[:, 0], sample_r2[:, 1])


def _as_json(gap: Difference) -> dict[str, float]:
    return {name: rounded(value) for name, value in gap._asdict().items()}
