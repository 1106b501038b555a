"""Errors that a program can catch by their own class, without the layers that Ray puts around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from f2llm_ray.base.errors import plain_error


@contextmanager
def plainly() -> Iterator[None]:
    """Raises the error of ours that a task met in place of the one that Ray made of it."""
    try:
        yield
    except Exception as error:
        plain = plain_error(error)
        if plain is None or plain is error:
            raise
        raise plain from None
