"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

MACHINE = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")
"""Of a container: its limit and what it uses, in `memory.max` and `memory.current`."""


def free_memory() -> int | None:
    """Bytes that are free on the machine and within the container's limit; None where the system does not say."""
    found = [free for free in (_of_machine(), _of_group()) if free is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    try:
        lines = MACHINE.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _of_group() -> int | None:
    try:
        limit, used = (
            (GROUP / f"memory.{name}").read_text(encoding="ascii").strip() for name in ("max", "current")
        )
    except OSError:
        return None
    return None if limit == "max" else int(limit) - int(used)
