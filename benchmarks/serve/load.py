"""Load over HTTP/1.1 on kept-alive connections, light enough that a server on the same two cores is not disturbed.

Raw asyncio, no HTTP library: requests are bytes made beforehand, and of an answer only the status and the length
are read. The client's own limit is its rate against `serve_fixed`.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import uvloop

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
FAILED = 0
"""Stands for the status of a request whose connection broke before the whole answer came."""


def http_request(path: str, body: bytes, port: int) -> bytes:
    """A POST of JSON as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass
class Load:
    """The answers to a time of load."""

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: dict[int, list[float]] = field(default_factory=dict)
    """Seconds of each answer, by status."""
    cpu_seconds: float = 0.0
    """CPU time of the client itself."""
    last: bytes = b""
    """Body of the last answer."""

    def add(self, status: int, seconds: float) -> None:
        """Counts one answer."""
        self.statuses[status] += 1
        self.latencies.setdefault(status, []).append(seconds)

    def summary(self, texts_per_request: int) -> dict[str, Any]:
        """Texts per second and latencies of the answers with status 200, and the number of others by status."""
        good = self.latencies.get(200) or [0.0]
        p50, p99 = np.percentile(np.array(good) * 1000, (50, 99))
        errors = {str(status): count for status, count in self.statuses.items() if status != 200}
        return {
            "texts_per_s": round(self.statuses[200] * texts_per_request / self.seconds, 1),
            "p50_ms": round(float(p50), 1),
            "p99_ms": round(float(p99), 1),
            "errors": errors,
            "client_cpu_share": round(self.cpu_seconds / self.seconds, 3),
        }


class Connection(asyncio.Protocol):
    """One kept-alive connection, one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._need = self._body = 0
        self._status = FAILED
        self._last = False
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def ask(self, request: bytes) -> Awaitable[tuple[int, bytes]]:
        """Sends a request; the status and body of its answer, or `FAILED`."""
        self._answer = asyncio.get_running_loop().create_future()
        if self.transport is None or self.transport.is_closing():
            self._done(FAILED, b"")
        else:
            self.transport.write(request)
        return self._answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio's protocol."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but its base class

    def data_received(self, data: bytes) -> None:
        """Part of asyncio's protocol."""
        self._buffer += data
        if not self._need:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            length = LENGTH.search(self._buffer, 0, end + 2)
            self._status = int(self._buffer[9:12])
            self._last = CLOSE.search(self._buffer, 0, end + 2) is not None
            self._need = end + 4 + (int(length[1]) if length else 0)
            self._body = end + 4
        if len(self._buffer) >= self._need:
            body = bytes(self._buffer[self._body : self._need])
            self._buffer.clear()
            self._need = 0
            if self._last and self.transport is not None:  # HAProxy says so when it reads a new configuration
                self.transport.close()
                self.transport = None
            self._done(self._status, body)

    def connection_lost(self, exc: Exception | None) -> None:
        """Part of asyncio's protocol."""
        del exc
        self.transport = None
        self._done(FAILED, b"")

    def _done(self, status: int, body: bytes) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((status, body))


async def _connect(port: int) -> Connection:
    loop = asyncio.get_running_loop()
    while True:
        try:
            _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)
        else:
            return connection


class Client:
    """One client: it sends requests, and connects again where the server closed the connection."""

    def __init__(self, port: int, load: Load) -> None:
        self._port, self._load = port, load
        self._connection: Connection | None = None

    async def ask(self, request: bytes) -> None:
        """Sends one request and counts its answer."""
        if self._connection is None or self._connection.transport is None:
            self._connection = await _connect(self._port)
        started = time.perf_counter()
        status, body = await self._connection.ask(request)
        self._load.add(status, time.perf_counter() - started)
        self._load.last = body

    def close(self) -> None:
        """Closes the connection."""
        if self._connection is not None and self._connection.transport is not None:
            self._connection.transport.close()


def closed(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Load:
    """Load from `clients` clients, each with one request at a time and no pause between them."""

    async def work(load: Load) -> None:
        end = time.perf_counter() + seconds
        turn = iter(range(10**9))

        async def client() -> None:
            mine = Client(port, load)
            while time.perf_counter() < end:
                await mine.ask(requests[next(turn) % len(requests)])
            mine.close()

        await asyncio.gather(*(client() for _ in range(clients)))

    return _measured(work)


def paced(port: int, requests: Sequence[bytes], per_second: float, seconds: float, clients: int) -> Load:
    """Load of `per_second` requests, whether or not the server keeps up, on at most `clients` connections.

    A request that finds no connection free is put off: with `clients` well above what the server lets in, that
    happens only where the server neither answers nor refuses.
    """

    async def work(load: Load) -> None:
        began = time.perf_counter()
        turn = iter(range(round(per_second * seconds)))

        async def client() -> None:
            mine = Client(port, load)
            for number in turn:
                await asyncio.sleep(max(0.0, began + number / per_second - time.perf_counter()))
                if time.perf_counter() > began + seconds:
                    break
                await mine.ask(requests[number % len(requests)])
            mine.close()

        await asyncio.gather(*(client() for _ in range(clients)))

    return _measured(work)


def _measured(work: Callable[[Load], Coroutine[Any, Any, None]]) -> Load:
    load = Load()
    cpu, began = time.process_time(), time.perf_counter()
    uvloop.run(work(load))
    load.seconds = time.perf_counter() - began
    load.cpu_seconds = time.process_time() - cpu
    return load


class _Fixed(asyncio.Protocol):
    """A server that answers anything with the same bytes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        del data
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")


def serve_fixed(port: int) -> None:
    """Serves a fixed answer until it is stopped, to measure the client's own limit."""

    async def work() -> None:
        server = await asyncio.get_running_loop().create_server(_Fixed, "127.0.0.1", port)
        await server.serve_forever()

    uvloop.run(work())
