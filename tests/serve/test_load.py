"""The endpoint behind HAProxy at four times what it can do, and with a replica killed: minutes, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.serve import stress
from benchmarks.serve.__main__ import make_model, texts_of_kind
from benchmarks.serve.servers import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("serve") / MODEL
    make_model(model)
    return model


def test_overload_is_refused_at_once_and_leaves_nothing_behind(folder: Path) -> None:
    found = stress.overload(folder, texts_of_kind("short"), seconds=60)
    assert set(found["statuses"]) == {200, 429}
    assert found["asked_per_s"] > 1.5 * found["capacity_per_s"]
    # Who is let in waits for those before it and no longer: the queue's length over the rate, with room for a
    # machine that others use too.
    assert found["accepted"]["p99_ms"] < 4000 * stress.QUEUED / found["accepted_per_s"]
    assert found["memory_grown_mb"] < 50
    assert set(found["statuses_after"]) == {200}
    assert found["capacity_after_per_s"] > 0.5 * found["capacity_per_s"]


def test_a_killed_replica_costs_no_request_and_comes_back(folder: Path) -> None:
    found = stress.kill(folder, texts_of_kind("short"), seconds=30)
    assert found["lost"] == 0
    assert found["replicas_after"] == 2
    assert set(found["statuses_after"]) == {200}
