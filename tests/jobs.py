"""A job in a process of its own, as `ray job submit` starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

JOBS = Path(__file__).parents[1] / "jobs"


def start_job(name: str, *arguments: object) -> subprocess.Popen[str]:
    """Starts jobs/NAME.py in a session of its own; what it prints is read from its stdout."""
    return subprocess.Popen(
        [sys.executable, str(JOBS / f"{name}.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
