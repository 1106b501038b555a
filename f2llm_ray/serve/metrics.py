"""What the endpoint counts, in Ray's metrics. Dashboards rely on the names; docs/serving.md lists them."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from functools import cache

from ray.serve import metrics

OURS = re.compile(r"(# (HELP|TYPE) )?ray_f2llm_")
"""Lines of ours in what Ray's exporter of a node says."""
SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]
TEXTS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0]


class Meters:
    """The counters of one replica; Ray adds its application, deployment and replica to each."""

    def __init__(self) -> None:
        self._requests = metrics.Counter("f2llm_requests", "Requests answered", ("route", "code"))
        self._seconds = metrics.Histogram("f2llm_request_seconds", "From request to answer", SECONDS, ("route",))
        self._tokens = metrics.Counter("f2llm_tokens", "Tokens embedded, prompts and EOS included")
        self._batch = metrics.Histogram("f2llm_batch_texts", "Texts in one batch of the engine", TEXTS)
        self._queue = metrics.Histogram("f2llm_queue_seconds", "Wait of a batch's oldest request", SECONDS)
        self._forward = metrics.Histogram("f2llm_forward_seconds", "One batch through the engine", SECONDS)

    def request(self, route: str, status: int, seconds: float) -> None:
        """One request was answered."""
        self._requests.inc(tags={"route": route, "code": str(status)})
        self._seconds.observe(seconds, tags={"route": route})

    def batch(self, texts: int, tokens: int, waited: float, seconds: float) -> None:
        """One batch went through the engine."""
        self._tokens.inc(tokens, tags={})
        self._batch.observe(texts, tags={})
        self._queue.observe(waited, tags={})
        self._forward.observe(seconds, tags={})


async def exported() -> bytes | None:
    """Our metrics of this node in Prometheus text, as Ray's exporter has them (seconds old); None without one."""
    try:
        text = await asyncio.to_thread(_fetch)
    except OSError:
        return None
    kept = (line for line in text.splitlines(keepends=True) if OURS.match(line))
    return "".join(kept).encode()


def _fetch() -> str:
    with urllib.request.urlopen(_exporter(), timeout=5) as answer:  # noqa: S310 (an address that Ray gave)
        return str(answer.read().decode())


@cache
def _exporter() -> str:
    import ray

    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
