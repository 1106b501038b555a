"""f2llm_ray: train, prune, distil and serve multilingual text-embedding models on Ray.

The names below are what most programs need; docs/python.md shows them. They are loaded when they are first used,
so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from f2llm_ray.api.dedup import Deduplicated, dedup
    from f2llm_ray.api.model import Model, load
    from f2llm_ray.api.run import RunResult, evaluate_model, run_recipe

__version__ = "0.1.0"
__all__ = ["Deduplicated", "Model", "RunResult", "dedup", "evaluate_model", "load", "run_recipe"]

# None of these may be the name of a room, such as `run`: importing the room would put it in the place of the call.
_PLACES = {
    "Deduplicated": "dedup",
    "dedup": "dedup",
    "Model": "model",
    "load": "model",
    "RunResult": "run",
    "evaluate_model": "run",
    "run_recipe": "run",
}


def __getattr__(name: str) -> Any:
    """Loads a name of `__all__` (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.api.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
