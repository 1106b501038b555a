"""A real endpoint for tests: Ray Serve in a process of its own, so that tests that share it know nothing of Ray.

`python -m tests.serve.endpoint PORT FOLDER` deploys three applications over the models in FOLDER and says when
they are ready.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from f2llm_ray.engine.engine import Engine

TEXTS = [
    "The cat sat on the mat.",
    "El perro come una manzana.",
    "猫が眠っています。",
    "מה שלומך? مرحبا",
    "👩‍👩‍👧‍👦 family, é and é",
    "nul \x00 and bell \x07",
    "def add(a, b):\n\treturn a + b",
    " ",
    "the cat " * 200,
]
MAX_QUEUED, MAX_BODY = 48, 100_000
KEYED, ROUTER = "/keyed", "/family"
BROWSER = "https://pages.example"
"""The origin that /keyed answers browsers of."""
READY = "the endpoint is ready, and Ray's metrics are at "


@dataclass
class Server:
    """The endpoint: `/` is one model with narrow limits, `/keyed` one with keys, `/family` the router of both."""

    url: str
    folder: Path
    engine: Engine
    key: str
    """A key of /keyed and /family."""
    slow_key: str
    """One that may make two requests a minute."""
    log: Path
    """What the replicas print."""
    metrics_url: str
    """Ray's exporter of the node."""

    def post(self, route: str, content: Any, key: str | None = None, **kwargs: Any) -> httpx.Response:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.post(self.url + route, content=body, headers=headers, timeout=60, **kwargs)

    def embed(self, inputs: str | list[str], **fields: Any) -> np.ndarray[Any, Any]:
        response = self.post("/embed", {"inputs": inputs, **fields})
        assert response.status_code == 200, response.text
        return np.array(response.json(), dtype=np.float32)


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    return dict(body["error"])


def main(port: int, folder: Path) -> None:
    import ray
    from ray import serve

    from f2llm_ray.serve import app, router

    one: dict[str, Any] = {"root": str(folder), "max_queued": MAX_QUEUED, "max_body_bytes": str(MAX_BODY)}
    keyed = {"model": str(folder / "wide"), "aliases": ["text-embedding-3-small"], "access_log": True}
    keyed |= {"keys": str(folder / "keys.txt"), "token_ids": False, "cors_origins": [BROWSER]}
    routed = {"models": {"tiny": one, "keyed": keyed}, "keys": keyed["keys"]}
    ray.init("local", num_cpus=8, include_dashboard=False, logging_level="ERROR")
    try:
        # As in the configs: Serve's own access log would name every path.
        logging = {"enable_access_log": False}
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=logging)
        apps = {"/": ("tiny", app.build(one)), KEYED: ("keyed", app.build(keyed))}
        apps[ROUTER] = ("family", router.build(routed))
        serve.run_many(
            [
                serve.RunTarget(built, name=name, route_prefix=route, logging_config=logging)
                for route, (name, built) in apps.items()
            ]
        )
        node = ray.nodes()[0]
        print(f"{READY}http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics\n", flush=True)
        sys.stdin.read()  # until the tests close it
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
