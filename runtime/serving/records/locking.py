"""A folder that one process has to itself."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from magihuman.runtime.errors import OutputError
from magihuman.runtime.serving.record import NO_WAIT

LOCK = ".lock"


@contextmanager
def locked(folder: Path, wait_s: float) -> Iterator[None]:
    """Have the folder to oneself, made if need be; a process that dies gives it up.

    wait_s: for a server that has just been killed. Raises `OutputError` where another has it.
    """
    end_s = time.monotonic() + wait_s
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        number = _lockable(folder)
        try:
            while not _has_locked(number):
                if time.monotonic() >= end_s:
                    raise OutputError(
                        f"the folder must be of one server alone, and another has {folder};"
                        " stop it, or name another folder"
                    )
                time.sleep(0.1)
            yield
        finally:
            os.close(number)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"the folder {folder} cannot be written to: {error.strerror}") from error


def _lockable(folder: Path) -> int:
    """Open the folder, which takes no room; or a file in it, where its file system locks no folder.

    No link is followed to that file, and what it holds stays.
    """
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _has_locked(number)
    except OSError:  # NFS locks only what is open for writing
        os.close(number)
        return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | NO_WAIT, 0o600)
    return number


def _has_locked(number: int) -> bool:
    """Lock an open file or folder, unless another process has."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
