"""What other packages register by entry points."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from magihuman.runtime.errors import InvalidRequestError


def plugged(group: str, name: str | None = None) -> list[Any]:
    """What the entry points of a group stand for, in order of their names.

    An entry point names a class or a function, which is called without arguments. name: of the
    one wanted; else all.

    Raises `InvalidRequestError` where one cannot be imported or called.
    """
    found = metadata.entry_points(group=group)
    chosen = [point for point in found if name is None or point.name == name]
    return [_loaded(point) for point in sorted(chosen, key=lambda point: point.name)]


def _loaded(point: metadata.EntryPoint) -> Any:
    try:
        return point.load()()
    except Exception as error:  # of another package: anything
        raise InvalidRequestError(
            f"the entry point {point.name!r} of {point.group!r} must be a class or a function"
            f" without arguments, got {point.value}: {type(error).__name__}: {error}"
        ) from error
