"""The endpoint that the tests of serving share."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.text_engine import calibrate, save_calibration
from f2llm_ray.run.folder import Folder
from f2llm_ray.serve.keys import new_key
from tests.ports import free_port
from tests.serve.endpoint import READY, Server
from tests.tiny import LINES, tiny_model


def calibrated(folder: Path) -> Engine:
    engine = Engine(folder)
    texts = [line[start:] for line in LINES for start in range(0, 40, 2)]
    save_calibration(Folder.at(str(folder)), calibrate(engine, engine.tokenize(texts)))
    return engine


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("served")
    folder = tiny_model(root / "distilled-0123abcd")
    engine = calibrated(folder)
    tiny_model(root / "wide", hidden=64, name="wide")
    scores = {"set": {"32": {"ndcg@10": 0.5, "acc@1": 0.25, "recall@10": 0.75}}}
    models = [
        {"name": "untrained", "folder": "gone"},
        {"name": "distilled", "folder": folder.name, "parameters": 123, "scores": scores},
    ]
    serving = {"max_inputs": 16, "max_queued": 7}
    report = {"models": models, "serving": serving, "created": "2026-01-02T03:04:05+00:00"}
    (root / "report.json").write_text(json.dumps(report))
    key = new_key(root / "keys.txt", "tests")
    slow_key = new_key(root / "keys.txt", "slow", per_minute=2)
    port, log = free_port(), root / "log.txt"
    command = [sys.executable, "-m", "tests.serve.endpoint", str(port), str(root)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, cwd=Path(__file__).parents[2]
        )
    assert process.stdin is not None
    try:
        while "/metrics\n" not in log.read_text().partition(READY)[2]:
            if process.poll() is not None:
                pytest.fail(log.read_text())
            time.sleep(0.2)
        metrics_url = log.read_text().partition(READY)[2].split()[0]
        yield Server(f"http://127.0.0.1:{port}", folder, engine, key, slow_key, log, metrics_url)
    finally:
        process.stdin.close()
        process.wait(60)
