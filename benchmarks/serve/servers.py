"""The servers that are compared: each a process of its own over the same model folder, on loopback.

`python -m benchmarks.serve.servers KIND PORT FOLDER REPLICAS SETTINGS` is such a process; the parent starts it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.serve.load import closed, http_request, serve_fixed

MODEL = "bench"
ROUTES = {"ours": "/v1/embeddings", "fastapi": "/v1/embeddings", "infinity": "/embeddings", "fixed": "/"}
START_S = 180
HAPROXY = Path(__file__).parents[2] / "serve_configs" / "haproxy.env"


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def settings_of(file: Path) -> dict[str, str]:
    """The variables that a shell takes from a file of settings."""
    command = ["sh", "-c", f"set -a; . {file}; env -0"]
    shown = subprocess.run(command, env={}, capture_output=True, check=True, text=True).stdout  # noqa: S603
    pairs = (entry.partition("=") for entry in shown.split("\0"))
    return {name: value for name, _, value in pairs if name.startswith("RAY_")}


def haproxy_env() -> dict[str, str]:
    """Ray Serve behind HAProxy, with ports of its own, so that several can run on one machine."""
    first = free_port()
    return {
        **settings_of(HAPROXY),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(min(first + 100, 65_535)),
    }


def body(texts: Sequence[str]) -> bytes:
    """A request of OpenAI's shape, with vectors in base64 as OpenAI's client requests them."""
    asked: Any = texts[0] if len(texts) == 1 else list(texts)
    return json.dumps({"model": MODEL, "input": asked, "encoding_format": "base64"}).encode()


@dataclass
class Running:
    """A server that answers."""

    name: str
    port: int
    process: subprocess.Popen[bytes]

    def requests(self, texts: Sequence[str], width: int) -> list[bytes]:
        """The texts as requests of `width` texts each."""
        pieces = [texts[i : i + width] for i in range(0, len(texts), width)]
        return [http_request(ROUTES[self.name], body(piece), self.port) for piece in pieces]

    def tree(self) -> list[psutil.Process]:
        """The process and all below it."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time so far: of the replicas (or the server), of HAProxy, and of Ray around them."""
        used: Counter[str] = Counter()
        for process in self.tree():
            try:
                times, part = process.cpu_times(), _part(self.name, process)
            except psutil.NoSuchProcess:
                continue
            used[part] += times.user + times.system
        return dict(used)

    def replicas(self) -> list[psutil.Process]:
        """The processes that answer; each has one below it that holds the model."""
        return [one for one in self.tree() if " ".join(one.cmdline()).startswith("ray::ServeReplica")]

    def update(self, settings: Mapping[str, Any]) -> None:
        """Deploys the same model again with other settings, beside the replicas that answer."""
        assert self.process.stdin is not None  # noqa: S101 (for the type: it is a pipe)
        self.process.stdin.write(json.dumps(dict(settings)).encode() + b"\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        """Closes the input of the process, which ends it, and waits."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(60 if self.name == "ours" else 1)
        except subprocess.TimeoutExpired:
            self.process.kill()


def _part(server: str, process: psutil.Process) -> str:
    if server != "ours":
        return "server"
    title = " ".join(process.cmdline()) or process.name()
    if title.startswith("ray::ServeReplica") or "f2llm_ray.engine.engine_process" in title:
        return "replica"
    return "haproxy" if process.name().startswith("haproxy") else "ray"


def start(
    name: str,
    folder: Path,
    log: Path,
    *,
    threads: int,
    replicas: int = 1,
    python: str = sys.executable,
    settings: Mapping[str, Any] | None = None,
) -> Running:
    """Starts a server and returns when it has answered a request.

    Raises:
        RuntimeError: it did not start; the message has the end of its output.
    """
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [python, "-m", "benchmarks.serve.servers", name, str(port), str(folder), str(replicas)]
    command.append(json.dumps(dict(settings or {})))
    if name == "ours":
        environment |= haproxy_env()
    if name == "infinity":
        environment |= {"DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0", "HF_HUB_OFFLINE": "1"}
        command = [str(Path(python).with_name("infinity_emb")), "v2", "--model-id", str(folder)]
        command += ["--served-model-name", MODEL]
        command += ["--host", "127.0.0.1", "--port", str(port), "--engine", "torch", "--device", "cpu"]
        command += ["--dtype", "float32", "--no-bettertransformer"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment)  # noqa: S603
    running = Running(name, port, process)
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            listening = probe.connect_ex(("127.0.0.1", port)) == 0
        if listening and closed(port, running.requests(["ready"], 1), 1, 0.01).statuses[200]:
            return running
        time.sleep(0.5)
    process.kill()
    raise RuntimeError(f"{name} did not start: {log.read_text(errors='replace')[-600:]}")


def _serve_ours(port: int, folder: str, replicas: int, settings: dict[str, Any]) -> None:
    import ray
    from ray import serve

    from f2llm_ray.serve.app import build

    threads = int(os.environ["OMP_NUM_THREADS"])
    ray.init("local", num_cpus=16, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"enable_access_log": False})
    options = {"num_replicas": replicas, "ray_actor_options": {"num_cpus": threads}}

    def deploy(given: dict[str, Any]) -> None:
        endpoint = build({"model": folder, **given})
        bound = endpoint._bound_deployment  # noqa: SLF001 (what a Serve config changes of a built application)
        endpoint._bound_deployment = bound.options(**options)  # noqa: SLF001
        serve.run(endpoint)

    try:
        deploy(settings)
        for line in sys.stdin:
            deploy({**settings, **json.loads(line)})
    finally:
        serve.shutdown()
        ray.shutdown()


def _serve_fastapi(port: int, folder: str) -> None:
    """What people write first: sentence-transformers behind FastAPI, encode in its thread pool."""
    import base64

    import torch
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel
    from sentence_transformers import SentenceTransformer

    class Ask(BaseModel):
        input: str | list[str]
        model: str
        encoding_format: str = "float"

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = SentenceTransformer(folder, device="cpu")
    app = FastAPI()

    def embeddings(ask: Ask) -> dict[str, Any]:
        texts = [ask.input] if isinstance(ask.input, str) else ask.input
        vectors = model.encode(texts, show_progress_bar=False)
        rows = [base64.b64encode(row.tobytes()).decode() for row in vectors]
        data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
        return {"object": "list", "data": data, "model": ask.model}

    embeddings.__annotations__["ask"] = Ask
    app.post("/v1/embeddings")(embeddings)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


def main() -> None:
    """One server, until its input closes or it is killed."""
    kind, port, folder, replicas, settings = sys.argv[1:]
    if kind == "ours":
        _serve_ours(int(port), folder, int(replicas), json.loads(settings))
    elif kind == "fastapi":
        _serve_fastapi(int(port), folder)
    else:
        serve_fixed(int(port))


if __name__ == "__main__":
    main()
