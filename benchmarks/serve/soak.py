"""Full load for as long as one likes, while everything that goes wrong does: what stock clients see of it.

Clients are OpenAI's, untouched: they try again twice. One text, 16 and 256, short and long, in turns; every 50th
request is left after 50 ms. A replica is killed six times in the whole, one engine is stopped (it hangs then), and
once a new version is deployed.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil

from benchmarks.serve.servers import MODEL, Running, start

CLIENTS = 8
KILLS = 6
SETTLED = 0.2
"""Share of the time after which memory is compared."""


@dataclass
class Seen:
    """What the clients have seen."""

    answered: Counter[int] = field(default_factory=Counter)
    """Requests by their number of texts."""
    lost: Counter[str] = field(default_factory=Counter)
    """Errors that came through after two tries, by their name."""
    left: int = 0
    seconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def client_of(port: int) -> openai.OpenAI:
    """A stock client."""
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")


def ask(port: int, texts: dict[str, list[str]], seed: int, seen: Seen, stop: threading.Event) -> None:
    """One client, until it is told to stop."""
    generator = random.Random(seed)  # noqa: S311
    with client_of(port) as client:
        while not stop.is_set():
            width = generator.choices((1, 16, 256), (0.8, 0.19, 0.01))[0]
            given = generator.choices(texts[generator.choice(sorted(texts))], k=width)
            if generator.random() < 0.02:
                try:
                    client.with_options(timeout=0.05, max_retries=0).embeddings.create(model=MODEL, input=given)
                except openai.APIConnectionError:
                    with seen.lock:
                        seen.left += 1
                continue
            started = time.monotonic()
            try:
                answer = client.embeddings.create(model=MODEL, input=given)
            except openai.OpenAIError as error:
                with seen.lock:
                    seen.lost[type(error).__name__] += 1
                continue
            assert len(answer.data) == width  # noqa: S101 (a lost vector is a failure of the run)
            with seen.lock:
                seen.answered[width] += 1
                seen.seconds.append(time.monotonic() - started)


def megabytes(server: Running) -> float:
    """Resident memory of the replicas and their engines."""
    held = [one for replica in server.replicas() for one in (replica, *replica.children(recursive=True))]
    total = 0
    for process in held:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 1e6


def disturb(server: Running, moment: int) -> None:
    """What goes wrong at one of `KILLS` + 2 moments: kills, and in between an engine that hangs and an update."""
    replica = random.Random(moment).choice(server.replicas())  # noqa: S311
    if moment == KILLS // 2:
        replica.children()[0].send_signal(signal.SIGSTOP)
    elif moment == KILLS // 2 + 2:
        server.update({"max_queued": 511})
    else:
        replica.kill()


def soak(folder: Path, texts: dict[str, list[str]], minutes: float) -> dict[str, Any]:
    """Two replicas under load for this long, with all disturbances spread over it."""
    server = start("ours", folder, folder.parent / "soak.log", threads=1, replicas=2)
    seen, stop = Seen(), threading.Event()
    clients = [
        threading.Thread(target=ask, args=(server.port, texts, seed, seen, stop)) for seed in range(CLIENTS)
    ]
    try:
        for client in clients:
            client.start()
        started, before = time.monotonic(), 0.0
        moments = [minutes * 60 * (n + 1.5) / (KILLS + 3) for n in range(KILLS + 2)]
        for moment, due in enumerate(moments):
            while (passed := time.monotonic() - started) < due:
                if not before and passed > SETTLED * minutes * 60:
                    before = _settled(server)
                time.sleep(0.5)
            disturb(server, moment)
        time.sleep(max(0.0, minutes * 60 - (time.monotonic() - started)))
        after = _settled(server)
    finally:
        stop.set()
        for client in clients:
            client.join()
        server.stop()
    p50, p99 = np.percentile(np.array(seen.seconds), (50, 99))
    return {
        "minutes": minutes,
        "answered": dict(seen.answered),
        "left": seen.left,
        "lost_by_error": dict(seen.lost),
        "lost": sum(seen.lost.values()),
        "memory_mb": round(after, 1),
        "growth_mb": round(after - before, 1),
        "p50_s": round(float(p50), 3),
        "p99_s": round(float(p99), 3),
    }


def _settled(server: Running) -> float:
    """Memory once there are two replicas with an engine each."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        replicas = server.replicas()
        if len(replicas) == 2 and all(one.children() for one in replicas):
            break
        time.sleep(0.5)
    time.sleep(5)
    return megabytes(server)
