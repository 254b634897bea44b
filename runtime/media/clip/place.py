"""Whether a file can be written at a place, asked before there is anything to write."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from magihuman.runtime.errors import OutputError

SPARE_BYTES = 2**20


def check_place(path: Path, what: str = "output", needed_bytes: int = 0) -> None:
    """Raise `OutputError` now where a file of so many bytes could not be written later.

    path: absolute. what: it is, for the message.
    """
    if os.path.isdir(path):
        raise OutputError(f"the {what} must be a file, got the folder {path}")
    check_folder(path.parent, what)
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OutputError(
            f"the {what}'s name must be one the disk takes, got {path.name}: {error.strerror}"
        ) from error
    check_room(path.parent, needed_bytes)


def check_folder(folder: Path, what: str = "output") -> None:
    """Raise `OutputError` where a folder is not there, or takes no files."""
    if not os.path.isdir(folder):
        raise OutputError(f"the {what}'s folder must exist, got {folder}; create it first")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".magihuman-"):
            pass
    except OSError as error:
        raise OutputError(
            f"the {what}'s folder {folder} cannot be written to: {error.strerror}"
        ) from error


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raise `OutputError` where the disk of a folder has not so many bytes, and some to spare."""
    needed, free = needed_bytes + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"the disk of {folder} must have {needed / 2**20:.0f} MiB free for this clip, got"
            f" {free / 2**20:.1f} MiB"
        )
