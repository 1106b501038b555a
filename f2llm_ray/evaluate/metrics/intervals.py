"""How far a score may be off by the draw of its texts: bootstrap intervals, and the same for differences.

A score is a statistic of units: queries, texts or pairs of texts. A resample draws as many units as there are,
with replacement, and is written as how often each unit was drawn, so that a statistic is computed for many
resamples and several dims at once. The same number of units and the same seed give the same resamples; that pairs
two models.

The intervals are percentile intervals (Efron 1979; for comparing two systems, Koehn 2004).

Shapes: n units, r resamples, b resamples of a block, m columns (dims or models).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from f2llm_ray.data.schema import rng

Values = np.ndarray[Any, np.dtype[np.float64]]
Statistic = Callable[[Values], Values]
"""From how often each unit counts [b, n], whole numbers, every row with the same sum, to the scores [b, m]."""

RESAMPLES = 1000
LEVEL = 0.95
# 8 bytes each for draws, counts and weights: 24 MB at a time.
BLOCK_ENTRIES = 1 << 20
# Scores that only rounding sets apart are equal.
ROUNDING = 1e-12


class Difference(NamedTuple):
    """Score of one model minus that of another on the same units."""

    difference: float
    low: float
    high: float
    """The 95 % interval's ends."""
    p: float
    """Two-sided: twice the share of resamples in which the difference has the other sign or is 0, at most 1."""


def mean_of(values_nm: Values) -> Statistic:
    """The statistic of scores that are means over units."""
    return lambda weight_bn: weight_bn @ values_nm / weight_bn.shape[1]


def bootstrap(statistic: Statistic, units: int, seed: str | int, *, resamples: int = RESAMPLES) -> Values:
    """A statistic over resamples of the units [r, m]; the seed and the number of units decide the resamples."""
    generator = rng("bootstrap", seed, units)
    block = max(1, BLOCK_ENTRIES // units)
    found = []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn_bn = generator.integers(0, units, (rows, units))
        drawn_bn += np.arange(rows)[:, None] * units
        counts = np.bincount(drawn_bn.ravel(), minlength=rows * units)
        found.append(statistic(counts.reshape(rows, units).astype(np.float64)))
    return np.concatenate(found)


def interval(sample_r: Values) -> tuple[float, float]:
    """The ends of the middle 95 % of a statistic's resamples."""
    low, high = np.quantile(sample_r, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def difference(a: float, b: float, sample_a_r: Values, sample_b_r: Values) -> Difference:
    """Compares two scores by their values on the same resamples."""
    sample_r = sample_a_r - sample_b_r
    low, high = interval(sample_r)
    # The scores themselves count as one resample more, so that p is never 0 (Davison and Hinkley 1997, 4.2).
    other = 1 + min(int(np.sum(sample_r <= ROUNDING)), int(np.sum(sample_r >= -ROUNDING)))
    return Difference(a - b, low, high, min(1.0, 2 * other / (1 + len(sample_r))))
