"""Starting and joining Ray where that fails, for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def failed(**environment: str) -> list[str]:
    """The lines of a command that needs Ray and cannot have it."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 1, done.stdout + done.stderr
    return [*done.stdout.splitlines(), *(line for line in done.stderr.splitlines() if line.startswith("error: "))]


SCRIPT = """
import sys
from argparse import ArgumentParser
from f2llm_ray.base.session import connect
from f2llm_ray.commands.command_line import main
sys.exit(main(ArgumentParser(), lambda _: connect(), []))
"""


def test_a_start_that_fails_is_tried_once_more_and_then_told_in_a_line(tmp_path: Path) -> None:
    # Sockets below a path as long as this cannot be made.
    lines = failed(RAY_TMPDIR=str(tmp_path / ("x" * 120)))
    assert [line.partition(" (")[0] for line in lines] == [
        "starting Ray ...",
        "Ray did not start",
        "error: Ray did not start on this machine, in two tries",
    ]
    assert "AF_UNIX path" in lines[-1]
    assert "`ray start --head`" in lines[-1]


def test_a_cluster_that_is_not_there_is_named() -> None:
    lines = failed(RAY_ADDRESS="no-such-scheme://here")
    assert len(lines) == 1
    assert lines[0].startswith("error: RAY_ADDRESS=no-such-scheme://here: cannot join this Ray cluster (")
    assert "unset RAY_ADDRESS" in lines[0]
