"""The engine in a process of its own gives what the engine gives, and says what went wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from f2llm_ray.base.errors import RunError
from f2llm_ray.engine.engine import Engine
from f2llm_ray.engine.engine_process import EngineProcess
from tests.tiny import LINES, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def apart(folder: Path) -> Iterator[EngineProcess]:
    """One thread there and here: with other numbers of them sums round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield EngineProcess(folder, tokens_per_pass=1024)
    torch.set_num_threads(threads)


def test_it_gives_the_engines_vectors(folder: Path, apart: EngineProcess) -> None:
    engine = Engine(folder)
    texts = [*LINES, "", "the cat " * 400, "猫"]
    np.testing.assert_array_equal(apart.embed(texts), engine.embed(texts))
    np.testing.assert_allclose(apart.embed(texts, dim=8), engine.embed(texts, dim=8), atol=1e-6)
    many = [f"{line} {number}" for number in range(500) for line in LINES]
    np.testing.assert_allclose(apart.embed(many), engine.embed(many), atol=1e-5)
    assert apart.vocabulary == engine.vocabulary
    assert apart.device == engine.device


def test_a_failure_there_is_told_here_and_the_next_request_runs(apart: EngineProcess) -> None:
    with pytest.raises(RuntimeError, match="IndexError: index out of range"):
        apart.embed_tokens([np.array([10**6], np.uint32)])
    assert apart.embed(LINES).shape == (len(LINES), 32)


def test_a_broken_model_is_told_as_it_starts(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "broken")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RunError, match="broken"):
        EngineProcess(folder, tokens_per_pass=64)


def child_of(process: psutil.Process, folder: Path) -> psutil.Process:
    (child,) = [found for found in process.children(recursive=True) if str(folder) in found.cmdline()]
    return child


def test_an_end_that_nobody_asked_for_is_noticed(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "killed")
    apart = EngineProcess(folder, tokens_per_pass=64)
    os.kill(child_of(psutil.Process(), folder).pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="has ended"):
        apart.embed(LINES)


def test_it_ends_with_the_process_that_asks(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from f2llm_ray.engine.engine_process import EngineProcess; "
        "engine = EngineProcess(Path(sys.argv[1]), tokens_per_pass=64); "
        "print('ready', flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    parent = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=Path(__file__).parents[2], **pipes)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    child.wait(timeout=20)
