"""How a command ends that is told to stop, or whose output has nowhere to go.

Exit codes: 128 and the signal's number after SIGTERM and SIGHUP, and 1 where standard output is
lost; a server that is told to stop ends with 0. Only the command line does this: a library that its
host has loaded installs no handlers.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

FAILED = 1
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # SIGINT is KeyboardInterrupt already


class LostOutputError(Exception):
    """Standard output is closed, or what it goes to is full. No `OSError`, which would be taken for
    one of the file that a command writes.
    """


class _Told:
    """Standard output, whose errors are told from all others. All else of it is as it was."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write as the stream does. Raises `LostOutputError`."""
        with _lost_told():
            written: int = self._stream.write(text)
            return written

    def flush(self) -> None:
        """Flush the stream. Raises `LostOutputError`."""
        with _lost_told():
            self._stream.flush()


@contextmanager
def _lost_told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LostOutputError(error.strerror or str(error)) from error


@contextmanager
def orderly() -> Iterator[None]:
    """End by signals as by exceptions, so that what is half-written is removed, and with one line
    where standard output is lost.
    """
    stream = sys.stdout
    if stream is not None:  # it was closed before the start
        sys.stdout = _Told(stream)
    code: str | int | None = 0
    try:
        with _ended_by_signals():
            try:
                yield
            except SystemExit as error:
                code = error.code
            if stream is not None:
                _Told(stream).flush()
    except LostOutputError as error:
        code = code or FAILED
        with suppress(OSError):
            print(f"error: standard output cannot be written to: {error}", file=sys.stderr)
        with suppress(OSError, ValueError):  # what still waits goes nowhere
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
    finally:
        sys.stdout = stream
    sys.exit(code)


@contextmanager
def noted_signals() -> Iterator[Callable[[], bool]]:
    """Only note the signals to end, for a server that ends in its own order, with exit code 0.

    A second one ends the process at once. What is ignored stays so. Yields whether one has come.
    """
    numbers = (*SIGNALS, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    installed = [number for number in numbers if before[number] is not signal.SIG_IGN]
    is_told = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal is_told
        is_told = True
        for each in installed:
            signal.signal(each, signal.SIG_DFL)

    for number in installed:
        signal.signal(number, note)
    try:
        yield lambda: is_told
    finally:
        for number in installed:
            signal.signal(number, before[number])


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Raise `SystemExit` where one of the signals comes that would end the process at once.

    What is ignored, as by nohup, stays so. Once one has come the others are ignored, too: they
    would break off the cleaning.
    """
    installed = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        for each in installed:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in installed:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in installed:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)
