"""The validation split, decided by content."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from f2llm_ray.data.schema import key_numbers


def is_validation(row_keys: pa.Array, share: float) -> pa.Array:
    """Whether each row belongs to the validation split: decided by its key alone, so it never changes sides."""
    low = key_numbers(row_keys)[:, 1] >> np.uint64(11)
    return pa.array(low.astype(np.float64) / 2.0**53 < share)
