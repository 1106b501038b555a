"""A small OpenAI-compatible endpoint over real HTTP, which can be told to fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

Embed = Callable[[Sequence[str]], np.ndarray]
Chat = Callable[[str, int], "str | int"]
"""The answer to a prompt that came so often before; a number is the status of a failure."""


@dataclass
class Endpoint:
    """What the endpoint was asked, and what it is told to do."""

    url: str = ""
    asked: list[str] = field(default_factory=list)
    """All texts that it has embedded."""
    prompts: list[str] = field(default_factory=list)
    """All prompts that came, also those that it failed on."""
    keys: set[str] = field(default_factory=set)
    """The keys that clients sent."""
    most: int | None = None
    """Texts after which every request fails."""


def _no_vectors(texts: Sequence[str]) -> np.ndarray:
    return np.zeros((len(texts), 1))


def _no_answer(prompt: str, before: int) -> int:
    del prompt, before
    return 404


@contextmanager
def openai_endpoint(embed: Embed = _no_vectors, chat: Chat = _no_answer) -> Iterator[Endpoint]:
    """Serves the vectors and answers of functions on loopback; its url ends in /v1."""
    state, lock = Endpoint(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path.endswith("/chat/completions"):
                self._chat(body)
                return
            with lock:
                state.keys.add(self.headers.get("Authorization", ""))
                if state.most is not None and len(state.asked) + len(body["input"]) > state.most:
                    self._answer(400, {"error": {"message": "quota is used up", "type": "invalid_request_error"}})
                    return
                vectors = embed(body["input"])
                state.asked += body["input"] if body["input"] != ["dim"] else []
            data = [
                {"object": "embedding", "index": n, "embedding": [float(x) for x in vector]}
                for n, vector in enumerate(vectors)
            ]
            usage = {"prompt_tokens": len(data), "total_tokens": len(data)}
            self._answer(200, {"object": "list", "model": body["model"], "data": data, "usage": usage})

        def _chat(self, body: dict[str, Any]) -> None:
            ((role, prompt),) = ((message["role"], message["content"]) for message in body["messages"])
            assert role == "user"
            with lock:
                state.keys.add(self.headers.get("Authorization", ""))
                before = state.prompts.count(prompt)
                state.prompts.append(prompt)
            said = chat(prompt, before)
            if isinstance(said, int):
                self._answer(said, {"error": {"message": "as the test says", "type": "server_error"}})
                return
            message = {"role": "assistant", "content": said}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            usage = {"prompt_tokens": len(prompt), "completion_tokens": len(said), "total_tokens": 0}
            about = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
            self._answer(200, {**about, "choices": choices, "usage": usage})

        def _answer(self, status: int, content: object) -> None:
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status != 200:
                self.send_header("retry-after-ms", "5")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
