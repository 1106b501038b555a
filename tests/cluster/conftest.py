"""A cluster started by hand, which slow tests share."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.serve.servers import haproxy_env
from tests.ports import free_port

BIN = Path(sys.executable).parent


@pytest.fixture(scope="package")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head with a token, started as docs and configs say; gives the environment that knows the token, and HEAD.

    HEAD is the dashboard's address.
    """
    port = free_port()
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_TMPDIR": str(tmp_path_factory.mktemp("ray")),
        **haproxy_env(),
        "HEAD": f"http://127.0.0.1:{port}",
    }
    ports = {"port": free_port(), "dashboard-port": port, "dashboard-agent-listen-port": free_port()}
    process = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"]
        + [f"--{name}={value}" for name, value in ports.items()]
        + [f"--dashboard-agent-grpc-port={free_port()}", f"--runtime-env-agent-port={free_port()}"]
        + ["--ray-client-server-port", str(free_port()), "--metrics-export-port", str(free_port())],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while socket.socket().connect_ex(("127.0.0.1", port)):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.5)
    time.sleep(5)  # the job agent comes after the dashboard
    yield environment
    os.killpg(process.pid, signal.SIGTERM)
    process.wait()
