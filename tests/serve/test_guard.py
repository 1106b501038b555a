"""An engine that fails or hangs ends its replica; a text that it cannot embed does not."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import uvicorn

from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.serve import batcher, replica
from f2llm_ray.serve.api import ApiError, Info
from f2llm_ray.serve.guard import WatchedEngine
from f2llm_ray.serve.replica import Replica
from f2llm_ray.serve.routes import web
from f2llm_ray.serve.served_model import Arguments, find_model
from tests.ports import free_port
from tests.tiny import tiny_model

LONG = 2048


@dataclass
class Running:
    """A replica behind a plain HTTP server; the reasons for which it would have ended."""

    url: str
    replica: Replica
    left: list[str]
    loop: asyncio.AbstractEventLoop

    def check_health(self) -> None:
        """As Ray Serve asks."""
        asyncio.run_coroutine_threadsafe(self.replica.check_health(), self.loop).result(60)

    def post(self, inputs: str | list[str], **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/embed", json={"inputs": inputs, **fields}, timeout=120)

    @property
    def engine(self) -> psutil.Process:
        return psutil.Process(self.replica.engine._process.pid)  # noqa: SLF001


@contextmanager
def serving(model: Path) -> Iterator[Running]:
    left: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica, "end_process", left.append)
        served = Replica(find_model(Arguments(model=str(model))))
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(web(lambda: served, Info), port=port, log_level="error"))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(server.serve(),), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield Running(f"http://127.0.0.1:{port}", served, left, loop)
    served.engine.kill()
    served.engine._process.wait(10)  # noqa: SLF001 (else it stays a zombie among this process's children)
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tiny_model(tmp_path_factory.mktemp("served") / "model", max_tokens=LONG)) as found:
        yield found


def test_a_large_request_holds_up_no_short_one(running: Running) -> None:
    """And one whose client leaves is not embedded to its end."""
    text = "the cat sat " * 450  # 1,800 tokens or so
    before = time.monotonic()
    running.post([text] * 10, truncate=True)
    large = [text] * min(1500, round(10 * 5 / (time.monotonic() - before)))  # some five seconds
    started, took = time.monotonic(), list[float]()

    def ask() -> None:
        answer = running.post(large, truncate=True)
        assert answer.status_code == 200, answer.text
        took.append(time.monotonic() - started)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(1)
    waits = []
    while not took and time.monotonic() - started < 60:
        before = time.monotonic()
        assert running.post("short").status_code == 200
        waits.append(time.monotonic() - before)
        assert httpx.get(f"{running.url}/health", timeout=60).status_code == 200
    thread.join()
    assert np.median(waits) < took[0] / 3
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{running.url}/embed", json={"inputs": large, "truncate": True}, timeout=httpx.Timeout(60, read=1)
        )
    before = time.monotonic()
    while running.replica.slots.taken:
        assert time.monotonic() - before < took[0] / 3
        time.sleep(0.01)
    assert running.left == []


def test_a_text_that_fails_is_told_and_the_replica_stays(running: Running) -> None:
    unknown = np.array([10**6], dtype=np.uint32)
    with pytest.raises(RuntimeError, match=r"IndexError|out of data bounds"):
        running.replica.watched.embed_tokens([unknown])
    assert running.left == []
    assert running.post("still here").status_code == 200


@dataclass
class Engine:
    """As an engine whose passes go wrong once it is told so."""

    wrong: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]] | None = None
    killed: list[bool] = field(default_factory=list)

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]

    def embed_tokens(self, tokens: Sequence[Tokens]) -> np.ndarray[Any, Any]:
        vectors = np.stack([np.eye(4, dtype=np.float32)[len(ids) % 4] for ids in tokens])
        return vectors if self.wrong is None else self.wrong(vectors)

    def kill(self) -> None:
        self.killed.append(True)


def raises(_: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (raises, "illegal memory access"),
        (lambda vectors: vectors * np.nan, "NaN or infinity"),
        (lambda vectors: np.full_like(vectors, np.inf), "NaN or infinity"),
    ],
)
def test_an_engine_that_is_broken_for_good_ends_its_replica(wrong: Any, reason: str) -> None:
    engine, left = Engine(), list[str]()
    watched = WatchedEngine(engine, left.append)  # type: ignore[arg-type]
    assert watched.embed_tokens(engine.tokenize(["fine"])).shape == (1, 4)
    engine.wrong = wrong
    with pytest.raises(RuntimeError, match=reason):
        watched.embed_tokens(engine.tokenize(["anything"]))
    assert len(left) == len(engine.killed) == 1
    assert reason in left[0]


def test_wrong_vectors_after_an_error_are_noticed() -> None:
    engine, left, passes = Engine(), list[str](), [0]

    def once_then_wrong(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        passes[0] += 1
        return raises(vectors) if passes[0] == 1 else np.roll(vectors, 1, axis=1)

    watched = WatchedEngine(engine, left.append)  # type: ignore[arg-type]
    engine.wrong = once_then_wrong
    with pytest.raises(RuntimeError):
        watched.embed_tokens(engine.tokenize(["anything"]))
    assert "away (1 - cosine)" in left[0]


@pytest.mark.parametrize("busy", [True, False])
def test_an_engine_that_hangs_is_ended_with_its_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, busy: bool
) -> None:
    monkeypatch.setattr(batcher, "STALLED_S", 1.0)
    monkeypatch.setattr(batcher, "FIRST_PACE", 1e9)
    monkeypatch.setattr(replica, "STALLED_S", 1.0)
    with serving(tiny_model(tmp_path / "model")) as running:
        engine = running.engine
        engine.send_signal(signal.SIGSTOP)
        try:
            if busy:
                threading.Thread(target=running.post, args=("waits",), daemon=True).start()
            time.sleep(1.5)  # so that no vector is fresh, and what waits is late
            refused = httpx.get(f"{running.url}/health", timeout=30)
            if busy:
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "not_ready"
            deadline = time.monotonic() + 10
            while not running.left:  # the probe of the page may still be on its way
                assert time.monotonic() < deadline
                with suppress(ApiError):
                    running.check_health()
            assert "hangs" in running.left[0]
            assert running.replica.engine._process.wait(10) == -signal.SIGKILL  # noqa: SLF001
        finally:
            if psutil.pid_exists(engine.pid):
                os.kill(engine.pid, signal.SIGCONT)


def test_an_engine_that_dies_while_idle_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "FRESH_S", 0.0)
    with serving(tiny_model(tmp_path / "model")) as running:
        running.check_health()
        running.engine.kill()
        assert httpx.get(f"{running.url}/health", timeout=30).status_code == 503
        assert "has ended" in running.left[0]
