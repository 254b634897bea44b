"""Who may call an engine: its own process, and no callback of a request that it is serving."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from magihuman.runtime.errors import MagiHumanError

_first_process: int | None = None  # that has loaded an engine


class Callers:
    """Tells the calls that would wait for good: of each engine one."""

    def __init__(self) -> None:
        global _first_process
        self._process = os.getpid()
        _first_process = _first_process or self._process
        self._thread = threading.local()

    @property
    def are_forked(self) -> bool:
        """Whether this process is a fork of the one that loaded the engine."""
        return os.getpid() != self._process

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Serve a request in this thread: what calls the engine meanwhile is a callback of it."""
        self._thread.serves = True
        try:
            yield
        finally:
            self._thread.serves = False

    def check_process(self) -> None:
        """Raise `MagiHumanError` in a fork: the engine's threads and locks stayed in the parent."""
        _check(self._process)

    def check(self, what: str) -> None:
        """Raise `MagiHumanError` where a call would wait for good. what: is being called."""
        self.check_process()
        if getattr(self._thread, "serves", False):
            raise MagiHumanError(
                f"{what} must not be called by a callback of the same engine, whose request"
                " would wait for itself; note there what is to be done, and do it in another thread"
                " or after the request"
            )


def check_can_load() -> None:
    """Raise `MagiHumanError` in a fork of a process that had loaded an engine: libraries that have
    started threads hang there.
    """
    if _first_process is not None:
        _check(_first_process)


def _check(process: int) -> None:
    if os.getpid() != process:
        raise MagiHumanError(
            f"an engine works in the process that loaded it, {process}, and this process,"
            f" {os.getpid()}, was forked from that; start processes with multiprocessing's 'spawn',"
            " and load in each"
        )
