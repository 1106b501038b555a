"""The paired bootstrap of two means, which comparisons of models are held to."""

from __future__ import annotations

import numpy as np

from f2llm_ray.evaluate.metrics.intervals import Difference, Values, bootstrap, difference, mean_of


def paired_bootstrap(a_q: Values, b_q: Values, seed: str | int) -> Difference:
    """Whether one model's mean over queries is above another's, by resampling the queries of both alike.

    Args:
        a_q: the one model's value of each query.
        b_q: the other's, in the same order.
        seed: decides the resamples.

    Raises:
        ValueError: they are not of the same number of queries, or of none.
    """
    if len(a_q) != len(b_q) or not len(a_q):
        raise ValueError(f"paired_bootstrap: {len(a_q)} values against {len(b_q)}, expected as many, at least 1")
    sample_r2 = bootstrap(mean_of(np.column_stack([a_q, b_q]).astype(np.float64)), len(a_q), seed)
    return difference(float(np.mean(a_q)), float(np.mean(b_q)), sample_r2[:, 0], sample_r2[:, 1])
