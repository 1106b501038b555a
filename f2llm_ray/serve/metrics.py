"""What the endpoint counts, in Ray's metrics. Dashboards rely on the names; docs/serving.md lists them."""

from __future__ import annotations

from ray.serve import metrics

SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]
TEXTS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0]


class RequestMetrics:
    """The metrics of one replica; Ray adds its application, deployment and replica to each as labels."""

    def __init__(self) -> None:
        self._requests = metrics.Counter("f2llm_requests", "Requests answered", ("route", "code"))
        self._seconds = metrics.Histogram("f2llm_request_seconds", "From request to answer", SECONDS, ("route",))
        self._tokens = metrics.Counter("f2llm_tokens", "Tokens embedded, prompts and EOS included")
        self._batch = metrics.Histogram("f2llm_batch_texts", "Texts in one batch of the engine", TEXTS)
        self._queue = metrics.Histogram("f2llm_queue_seconds", "Wait of a batch's oldest request", SECONDS)
        self._forward = metrics.Histogram("f2llm_forward_seconds", "One batch through the engine", SECONDS)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        self._requests.inc(tags={"route": route, "code": str(status)})
        self._seconds.observe(seconds, tags={"route": route})

    def batch(self, texts: int, tokens: int, waited: float, seconds: float) -> None:
        """Counts a batch that the engine has embedded."""
        self._tokens.inc(tokens, tags={})
        self._batch.observe(texts, tags={})
        self._queue.observe(waited, tags={})
        self._forward.observe(seconds, tags={})
