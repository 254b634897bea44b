"""A folder for Ray's sockets and logs, for nobody else, and removed in the end."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from magihuman.runtime.errors import OutputError

PREFIX = "magihuman-"
RAY = "ray"  # Ray opens its own folder to everybody, so that it lies in one that is not
# Of the base: a socket's path has 107 bytes at most, and those of Ray are up to 68 longer than that
# of the folder.
LONGEST = 107 - 68 - len(f"/{PREFIX}12345678/{RAY}")


@contextmanager
def private_folder() -> Iterator[Path]:
    """Make the folder that Ray is given, and remove it; also those that killed servers left.

    Raises `OutputError` where there is no place for it.
    """
    base = _base()
    _sweep(base)
    try:
        own = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        place = os.open(own, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(
            f"a folder for temporary files must be writable, and {base} is not: {error.strerror};"
            " name another with TMPDIR"
        ) from error
    try:
        fcntl.flock(place, fcntl.LOCK_EX)  # while this process lives
        (own / RAY).mkdir(mode=0o700)
        yield own / RAY
    finally:
        remove(own)
        os.close(place)


def close_to_others(folder: Path) -> None:
    """Take back what Ray has given to everybody: its folder, and those of its sessions."""
    for place in (folder, *folder.glob("session_*")):
        if not place.is_symlink():
            place.chmod(0o700)


def remove(own: Path) -> None:
    """Remove it, also under processes that have not ended yet and would go on filling it."""
    gone = own.with_name(f"{own.name}.gone")
    with suppress(OSError):
        own.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _base() -> Path:
    base = tempfile.gettempdir()
    return Path(base if len(os.fsencode(base)) <= LONGEST else "/tmp")  # noqa: S108 - a folder is drawn in it


def _sweep(base: Path) -> None:
    """Remove what servers of this user have left that could not do so themselves."""
    for place in base.glob(f"{PREFIX}*/{RAY}"):
        own = place.parent
        with suppress(OSError):
            descriptor = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.getuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove(own)
            finally:
                os.close(descriptor)
