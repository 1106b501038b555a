"""How long one query takes by itself."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest

from f2llm_ray.evaluate.measure import QUERIES, query_ms
from tests.evaluate.planted import Planted


class Slow(Planted):
    """Takes 1 ms a letter, and 50 ms more the first time."""

    def embed_counted(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        time.sleep(0.001 * sum(map(len, texts)) + (0.0 if self.asked else 0.05))
        return super().embed_counted(texts)


def test_queries_are_asked_one_by_one_and_the_first_time_does_not_count() -> None:
    texts = ["abcde"] * 2 + ["a" * 12] * (3 * QUERIES)
    model = Slow({text: [1.0] for text in texts})
    assert query_ms(model, texts) == pytest.approx(12, abs=4)
    assert len(model.asked) == QUERIES + 1
    alone = Slow({"abcde": [1.0]})
    assert query_ms(alone, ["abcde"]) == pytest.approx(5, abs=4)
