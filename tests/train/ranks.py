"""Two ranks of a process group on this machine, for laws that hold across ranks."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def on_two_ranks(work: Callable[[int, int, str], None], folder: Path) -> list[Any]:
    """What each rank's `work(rank, port, folder)` saved as `folder`/<rank>.pt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
