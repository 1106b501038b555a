"""Replicas come and go with the load, and versions with deployments, and no request is lost (minutes: slow)."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from f2llm_ray.model.checkpoint import CALIBRATION_FILE
from f2llm_ray.serve import app, router
from f2llm_ray.serve.served_model import Arguments, find_model, options
from tests.serve.conftest import calibrated, free_port
from tests.serve.endpoint import error_of
from tests.tiny import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    port = free_port()
    ray.init("local", num_cpus=8, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@contextmanager
def load(url: str, clients: int) -> Iterator[Counter[tuple[int, int]]]:
    """Clients that ask without a pause; counts answers by status and width of the vector."""
    seen: Counter[tuple[int, int]] = Counter()
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(timeout=300) as client:
            while not stop.is_set():
                try:
                    answer = client.post(url, json={"inputs": "the cat " * 20})
                    seen[answer.status_code, len(answer.json()[0]) if answer.status_code == 200 else 0] += 1
                except httpx.HTTPError as error:
                    seen[0, hash(type(error).__name__) % 1000] += 1

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def running(name: str) -> int:
    return serve.status().applications[name].deployments["ModelServer"].replica_states.get("RUNNING", 0)


def wait(done: Callable[[], bool], seconds: float = 240) -> float:
    started = time.monotonic()
    while not done():
        assert time.monotonic() - started < seconds
        time.sleep(0.2)
    return time.monotonic() - started


def test_from_zero_to_one_to_two_to_one_to_zero(url: str, tmp_path: Path) -> None:
    args: dict[str, Any] = {"model": str(tiny_model(tmp_path / "model"))}
    served = find_model(Arguments(**args))
    scaling = {
        "min_replicas": 0,
        "initial_replicas": 0,
        "max_replicas": 2,
        "target_ongoing_requests": 3,
        "metrics_interval_s": 1,
        "look_back_period_s": 2,
        "upscale_delay_s": 1,
        "downscale_delay_s": 5,
        "downscale_to_zero_delay_s": 20,
    }
    deployment = serve.deployment(app.ModelServer).options(**options(served.settings), autoscaling_config=scaling)
    serve.run(deployment.bind(served), name="rare", route_prefix=None)
    for name, seconds in (("hasty", 0.5), ("patient", 240)):
        routed = router.build({"models": {"rare": args}, "start_wait_s": seconds})
        serve.run(routed, name=name, route_prefix=f"/{name}")
    assert running("rare") == 0
    assert httpx.get(f"{url}/hasty/v1/models", timeout=60).json()["data"][0]["id"] == "tiny"
    assert running("rare") == 0, "asking for the list woke the model"

    refused = httpx.post(f"{url}/hasty/embed", json={"inputs": "a"}, timeout=60)
    assert (refused.status_code, error_of(refused)["code"]) == (503, "starting")
    assert int(refused.headers["retry-after"]) >= 1
    answer = httpx.post(f"{url}/patient/embed", json={"inputs": "a"}, timeout=300)
    assert answer.status_code == 200
    assert running("rare") == 1
    with load(f"{url}/patient/embed", clients=24) as seen:
        wait(lambda: running("rare") == 2)
    with load(f"{url}/patient/embed", clients=1) as fewer:
        wait(lambda: running("rare") == 1)
    assert {status for status, _ in seen | fewer} == {200}
    wait(lambda: running("rare") == 0)
    for name in ("rare", "hasty", "patient"):
        serve.delete(name)


def test_a_new_version_loses_no_request_and_a_wrong_one_never_goes_live(url: str, tmp_path: Path) -> None:
    old, new, wrong = tiny_model(tmp_path / "a"), tiny_model(tmp_path / "b", hidden=64), tmp_path / "c"
    calibrated(old)
    calibrated(new)
    tiny_model(wrong, hidden=64, name="wrong")
    shutil.copy(old / CALIBRATION_FILE, wrong)

    def deploy(folder: Path) -> None:
        serve.run(app.build({"model": str(folder), "name": "live"}), name="live", route_prefix="/live")

    deploy(old)
    with load(f"{url}/live/embed", clients=8) as seen:
        wait(lambda: seen[200, 32] > 20)
        deploy(new)
        wait(lambda: seen[200, 64] > 20)
    assert set(seen) == {(200, 32), (200, 64)}, seen
    with load(f"{url}/live/embed", clients=8) as seen:
        with pytest.raises(RuntimeError):
            deploy(wrong)
        message = serve.status().applications["live"].deployments["ModelServer"].message
        assert "self-check failed" in message
        assert str(wrong) in message
        before = seen.total()
        wait(lambda: seen.total() > before + 20)
    assert set(seen) == {(200, 64)}, seen
    deploy(old)
    assert len(httpx.post(f"{url}/live/embed", json={"inputs": "a"}, timeout=60).json()[0]) == 32
    serve.delete("live")
