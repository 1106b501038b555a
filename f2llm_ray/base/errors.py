"""The errors a user can cause and mend; each message names the place, what was found and what was expected."""

from __future__ import annotations


class F2LLMError(Exception):
    """Base of all errors that are shown as one message, without a stack trace."""


class RecipeError(F2LLMError):
    """A recipe that cannot be read, or that asks for something impossible."""


class DataError(F2LLMError):
    """A file, row or field that does not hold what the recipe says it holds."""


class RunError(F2LLMError):
    """A run folder in the wrong state: a stage missing, a folder that is no model, a root that cannot be used."""


class ArgumentError(F2LLMError, ValueError):
    """An argument of a Python call that cannot be."""


def plain_error(error: BaseException) -> F2LLMError | None:
    """Finds our own error inside the layers that Ray wraps around it (None when there is none).

    Ray carries a worker's exception in ``cause``, or in ``args`` where it broke an actor's start; Python in
    ``__cause__`` and ``__context__``; Ray Train V2 keeps one error per rank in ``worker_failures``.
    """
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        found = queue.pop(0)
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, F2LLMError):
            return found
        queue += [getattr(found, name, None) for name in ("cause", "__cause__", "__context__")]
        queue += [value for value in found.args if isinstance(value, BaseException)]
        failures = getattr(found, "worker_failures", None)
        if isinstance(failures, dict):
            queue += failures.values()
    return None
