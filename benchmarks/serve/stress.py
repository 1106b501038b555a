"""Our endpoint at four times its capacity, and with a replica killed under load; one JSON object last.

Overload: requests come at 4x the measured rate whether or not they are answered. Kill: two replicas, clients that
send requests without pause and never retry, SIGKILL to one replica; every answer other than 200 counts as lost.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serve.load import closed, paced
from benchmarks.serve.servers import MODEL, start
from benchmarks.serve.soak import megabytes, soak

QUEUED = 64
CLIENTS = 512
"""Connections of the overload: more than may wait, so that some requests are refused."""


def milliseconds(latencies: list[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    p50, p99 = np.percentile(np.array(latencies or [0.0]) * 1000, (50, 99))
    return {"p50_ms": round(float(p50), 1), "p99_ms": round(float(p99), 1)}


def overload(folder: Path, texts: list[str], seconds: float) -> dict[str, Any]:
    """Four times the capacity, and the time after."""
    server = start("ours", folder, folder.parent / "overload.log", threads=1, settings={"max_queued": QUEUED})
    try:
        requests = server.requests(texts, 1)
        before = closed(server.port, requests, 32, max(3.0, seconds / 10))
        capacity = before.statuses[200] / before.seconds
        paced(server.port, requests, 4 * capacity, seconds / 10, CLIENTS)
        memory = megabytes(server)
        load = paced(server.port, requests, 4 * capacity, seconds, CLIENTS)
        grown = megabytes(server) - memory
        after = closed(server.port, requests, 32, max(3.0, seconds / 10))
        return {
            "capacity_per_s": round(capacity, 1),
            "asked_per_s": round(sum(load.statuses.values()) / load.seconds, 1),
            "accepted_per_s": round(load.statuses[200] / load.seconds, 1),
            "statuses": dict(load.statuses),
            "accepted": milliseconds(load.latencies.get(200, [])),
            "refused": milliseconds(load.latencies.get(429, [])),
            "memory_mb": round(memory, 1),
            "memory_grown_mb": round(grown, 1),
            "statuses_after": dict(after.statuses),
            "capacity_after_per_s": round(after.statuses[200] / after.seconds, 1),
        }
    finally:
        server.stop()


def kill(folder: Path, texts: list[str], seconds: float) -> dict[str, Any]:
    """One of two replicas killed a quarter into the load; ends when there are two again."""
    server = start("ours", folder, folder.parent / "kill.log", threads=1, replicas=2)
    try:
        requests = server.requests(texts, 1)
        closed(server.port, requests, 16, 3.0)
        killed = server.replicas()[0]
        timer = threading.Timer(seconds / 4, killed.kill)
        timer.start()
        load = closed(server.port, requests, 16, seconds)
        deadline = time.monotonic() + 120
        while len(server.replicas()) < 2 and time.monotonic() < deadline:
            time.sleep(0.5)
        after = closed(server.port, requests, 16, 3.0)
        return {
            "statuses": dict(load.statuses),
            "lost": sum(count for status, count in load.statuses.items() if status != 200),
            "answered": milliseconds(load.latencies.get(200, [])),
            "replicas_after": len([one for one in server.replicas() if one.pid != killed.pid]),
            "statuses_after": dict(after.statuses),
        }
    finally:
        server.stop()


def main() -> None:
    """Runs both and prints the results."""
    from benchmarks.serve.__main__ import make_model, texts_of_kind

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", choices=("overload", "kill"))
    parser.add_argument("--minutes", type=float, help="instead: every failure under load (benchmarks.serve.soak)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / MODEL
        make_model(folder)
        if arguments.minutes:
            texts_by_kind = {kind: texts_of_kind(kind) for kind in ("short", "natural")}
            print(json.dumps(soak(folder, texts_by_kind, arguments.minutes)))
            return
        texts = texts_of_kind("short")
        runs = {"overload": overload, "kill": kill}
        chosen = [arguments.only] if arguments.only else list(runs)
        result = {name: runs[name](folder, texts, arguments.seconds) for name in chosen}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
