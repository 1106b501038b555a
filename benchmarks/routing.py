"""Two models behind one URL: the router, one application each asked directly, and Serve's multiplexing.

    python -m benchmarks.routing --seconds 10 --clients 16

The same two tiny models and the same number of replicas throughout; clients take turns between the models, with
stock requests (`model` in the body, no header). The last line is one JSON object: requests/s and milliseconds by
arrangement.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from f2llm_ray.serve import app, router
from f2llm_ray.serve.replica import Replica
from f2llm_ray.serve.served_model import Arguments, ServedModel, find_model
from tests.tiny import tiny_model

MODELS = ("small", "large")


class Multiplexed:
    """Both models in every replica, loaded when asked for."""

    def __init__(self, served: dict[str, ServedModel]) -> None:
        self.served = served

    @serve.multiplexed(max_num_models_per_replica=2)
    async def load(self, name: str) -> Replica:
        """One of the models, kept from then on."""
        return await asyncio.to_thread(Replica, self.served[name])

    async def __call__(self, request: Request) -> Response:
        """Answers as /embed does."""
        body = await request.body()
        replica = await self.load(json.loads(body)["model"])
        answer = await replica.answer("/embed", body)
        return Response(answer.content, media_type="application/json")


async def client(port: int, paths: list[str], until: float, taken: list[float]) -> None:
    """One keep-alive connection that asks the models in turn; a raw one, to leave the cores to the servers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    asks = []
    for path, model in zip(paths, MODELS, strict=True):
        body = json.dumps({"inputs": "The cat sat on the mat and looked at the rain.", "model": model}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        asks.append(head.encode() + body)
    turn = 0
    while time.perf_counter() < until:
        started = time.perf_counter()
        writer.write(asks[turn % 2])
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if " 200 " not in head.split("\r\n", 1)[0]:
            raise RuntimeError(head)
        await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0]))
        taken.append(time.perf_counter() - started)
        turn += 1
    writer.close()


async def measure(port: int, paths: list[str], clients: int, seconds: float) -> dict[str, float]:
    """Requests/s and percentiles, after a second of warming up."""
    await asyncio.gather(*(client(port, paths, time.perf_counter() + 1, []) for _ in range(clients)))
    taken: list[float] = []
    started = time.perf_counter()
    await asyncio.gather(*(client(port, paths, started + seconds, taken) for _ in range(clients)))
    wall = time.perf_counter() - started
    cuts = statistics.quantiles(taken, n=100)
    return {
        "requests_per_s": round(len(taken) / wall, 1),
        "p50_ms": round(cuts[49] * 1000, 1),
        "p99_ms": round(cuts[98] * 1000, 1),
    }


def main() -> None:
    """Runs the arrangements one after the other, three times over, and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init("local", num_cpus=8, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    found: dict[str, list[dict[str, float]]] = {"direct": [], "router": [], "multiplexed": []}
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"enable_access_log": False})
        with tempfile.TemporaryDirectory() as folder:
            args: dict[str, dict[str, Any]] = {
                name: {"model": str(tiny_model(Path(folder) / name, hidden=hidden)), "name": name}
                for name, hidden in zip(MODELS, (32, 64), strict=True)
            }
            served = {name: find_model(Arguments.model_validate(given)) for name, given in args.items()}
            for name, given in args.items():
                serve.run(app.build(given), name=name, route_prefix=f"/{name}")
            serve.run(router.build({"models": args}), name="router", route_prefix="/router")
            multiplexed = serve.deployment(Multiplexed).options(num_replicas=2, max_ongoing_requests=1000)
            serve.run(multiplexed.bind(served), name="multiplexed", route_prefix="/multiplexed")
            paths = {
                "direct": [f"/{name}/embed" for name in MODELS],
                "router": ["/router/embed"] * 2,
                "multiplexed": ["/multiplexed/embed"] * 2,
            }
            for _ in range(3):
                for name, rounds in found.items():
                    rounds.append(asyncio.run(measure(port, paths[name], options.clients, options.seconds)))
    finally:
        serve.shutdown()
        ray.shutdown()
    medians = {
        name: {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        for name, rounds in found.items()
    }
    print(json.dumps({"benchmark": "family", "clients": options.clients, **medians}))


if __name__ == "__main__":
    main()
