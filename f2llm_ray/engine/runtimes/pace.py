"""How fast each engine is on this machine, and the check that each runs through before it is used."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from f2llm_ray.base.errors import RunError
from f2llm_ray.data.tokens.store import Tokens
from f2llm_ray.engine.names import GraphName
from f2llm_ray.engine.runtimes.golden import Golden, shown
from f2llm_ray.engine.runtimes.graph_forward import GraphForward
from f2llm_ray.engine.runtimes.proof import FLOAT, cosine
from f2llm_ray.engine.runtimes.runtimes import RUNTIMES

if TYPE_CHECKING:
    from f2llm_ray.model.checkpoint import ModelInfo

SHORT = 64
"""Tokens of the longest golden text that is embedded here."""
TEXTS = 32
ROUNDS = 3


class Forward(Protocol):
    """What computes the forward pass."""

    def encode(self, tokens: Sequence[Tokens]) -> torch.Tensor:
        """Vectors [n, d] of token lists before normalisation, in the given order."""


@cache
def cpu_name() -> str:
    """The kind of this machine's CPU, as it says itself."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def open_forward(
    folder: Path, info: ModelInfo, name: GraphName, threads: int, tokens_per_pass: int = 1 << 14
) -> GraphForward:
    """Opens the file of a runtime in a folder.

    Raises:
        RunError: it does not load.
    """
    run = RUNTIMES[name].open(folder / RUNTIMES[name].file, threads=threads, output="last_hidden_state")
    return GraphForward(name, run, info.pooling, info.dims[-1], tokens_per_pass)


def check(forward: Forward, golden: Golden, place: str) -> None:
    """Embeds short golden texts as one batch, and compares them with the model's own vectors.

    Raises:
        RunError: one is not finite, or has a cosine below that of the proof.
    """
    places = _short(golden)
    with torch.inference_mode():
        found_nd = forward.encode([golden.tokens[i] for i in places]).float().numpy()
    cosine_n = cosine(found_nd, golden.vectors_vd[places])
    worst = int(cosine_n.argmin())
    if not cosine_n[worst] >= FLOAT.least:  # so that NaN fails too
        raise RunError(
            f"{place}: the vector of {shown(golden.texts[places[worst]])} has cosine {cosine_n[worst]:.6f} with "
            f"the model's own, expected at least {FLOAT.least}"
        )


def pace(forwards: Mapping[Any, Forward], golden: Golden) -> dict[str, float]:
    """Seconds that each takes for short golden texts, one by one and as a batch: the least of rounds in turns."""
    tokens = [golden.tokens[i] for i in _short(golden)]
    least = dict.fromkeys(forwards, float("inf"))
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, forward in forwards.items():
                started = time.perf_counter()
                for text in tokens[: TEXTS // 4]:
                    forward.encode([text])
                forward.encode(sorted(tokens, key=len, reverse=True))
                least[name] = min(least[name], time.perf_counter() - started)
    return {name: round(seconds, 6) for name, seconds in least.items()}


def _short(golden: Golden) -> list[int]:
    """Places of the texts: the longest first, as the engine hands them on."""
    places = [i for i in range(len(golden.vectors_vd)) if len(golden.tokens[i]) <= SHORT][:TEXTS]
    return sorted(places, key=lambda i: -len(golden.tokens[i]))
