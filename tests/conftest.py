"""What all tests share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from hypothesis import settings

from f2llm_ray.base.session import connect

# A shared or slow machine makes an example late, not wrong.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# mteb needs Python 3.11.
NEED_MTEB = ["evaluate/test_mteb.py", "evaluate/test_mteb_texts.py", "export/test_leaderboard.py"]
collect_ignore = [] if find_spec("mteb") else NEED_MTEB
# Graph files that engines make of tiny models go there, for all tests of a run and the processes that they start.
_cache = tempfile.TemporaryDirectory(prefix="f2llm-cache-")
os.environ["XDG_CACHE_HOME"] = _cache.name
# Ray Train looks every 2 s whether its workers are ready or done, and these trainings take seconds.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")


@pytest.fixture(scope="module")
def ray_here() -> None:
    """Ray, for all tests of a process that do not need one of their own.

    It is started once: a start and the imports of its workers take 10 s on 2 cores.
    """
    connect()


@pytest.fixture
def no_ray() -> Iterator[None]:
    """For a test that starts a Ray of its own; it is ended after the test, too."""
    import ray

    ray.shutdown()
    yield
    ray.shutdown()
