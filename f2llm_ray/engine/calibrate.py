"""Measuring a model's calibration, and checking a loaded model against it.

Shapes: n texts, k one of the trained dims, d the whole vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine.calibration import CHECK_TEXTS, Calibration
from f2llm_ray.engine.text_engine import TextEngine
from f2llm_ray.model.dims import cut_dims

WORST = 1e-3
"""Most that 1 - cosine of a check text may be: another machine gives about 1e-6 in float32, another model 0.1."""


def calibrate(engine: TextEngine, tokens: Sequence[Tokens]) -> Calibration:
    """Measures a model on token lists of training texts (what it will be asked: queries and passages)."""
    vectors_nd = engine.embed_tokens(tokens)
    ranges = {}
    for dim in engine.info.dims:
        cut_nk = cut_dims(vectors_nd, dim)
        ranges[dim] = np.stack([cut_nk.min(axis=0), cut_nk.max(axis=0)])
    return Calibration(ranges, engine.embed(CHECK_TEXTS))


def self_check(engine: TextEngine, calibration: Calibration, place: str) -> None:
    """Embeds the check texts again and compares them with the vectors stored when the model was made.

    Raises:
        RunError: a vector of another width, or one whose cosine is off by more than `WORST`.
    """
    found_nd = engine.embed(CHECK_TEXTS)
    if found_nd.shape != calibration.check_nd.shape:
        raise RunError(
            f"{place}: self-check failed: vectors of {found_nd.shape[1]} dims, stored ones have "
            f"{calibration.check_nd.shape[1]}"
        )
    off_n = 1 - np.sum(found_nd * calibration.check_nd, axis=1)
    worst = int(np.argmax(off_n))
    if not off_n[worst] <= WORST:  # so that NaN fails too
        raise RunError(
            f"{place}: self-check failed: the vector of {CHECK_TEXTS[worst]!r} is {off_n[worst]:.2g} away "
            f"(1 - cosine) from the one stored when the model was made, at most {WORST:g} is allowed"
        )
