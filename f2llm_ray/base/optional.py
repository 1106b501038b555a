"""Libraries that only some sources need: imported when used, and missed with a sentence that mends it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from f2llm_ray.base.errors import DataError


def require(module: str, *, extra: str) -> Any:
    """Imports a module of an optional dependency.

    Args:
        module: its dotted name.
        extra: the extra of this package that brings it.

    Raises:
        DataError: it is not installed; the message names the package and the extra.
    """
    try:
        return import_module(module)
    except ImportError:
        raise DataError(not_installed(module.partition(".")[0], extra=extra)) from None


def not_installed(package: str, *, extra: str) -> str:
    """The sentence for a package that is not there."""
    return f"package {package!r} is not installed; get it with: pip install 'f2llm-ray[{extra}]'"
