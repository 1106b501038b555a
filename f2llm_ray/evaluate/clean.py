"""Scores over the part of a set that was not trained on."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from f2llm_ray.evaluate.metrics.scores import Kind, LanguageGroups, columns, dims_of, rounded
from f2llm_ray.evaluate.tasks.registry import main_metric


def clean_scores(kind: Kind, units: pa.Table, contaminated: np.ndarray) -> dict[str, float]:
    """The main metric by dim, as `measured` computes it, over the units that were not trained on; {} without any.

    Args:
        kind: of the task.
        units: the table that measuring the task returned (`Measured.units`).
        contaminated: which of its rows hold a text that was trained on, booleans [n].
    """
    kept = units.filter(pa.array(~contaminated))
    if not len(kept):
        return {}
    groups, dims = LanguageGroups(kept["language"].to_pylist()), dims_of(kept)
    score_lm = groups.scores(main_metric(kind), *columns(kept, dims))
    return {str(dim): rounded(score) for dim, score in zip(dims, groups.weight_l @ score_lm, strict=True)}
