"""Files that this package keeps from run to run: timings, machine code, rewritten graphs.

Files lie in one folder for each kind, below the user's cache folder or below that which the
environment variable MAGIHUMAN_CACHE names. Other settings are arguments, and environment variables
are read in the command line and the server only. This one is the exception, since what is kept is
no matter of any caller: it is used below operators, which have no argument for it, and by processes
that others start. Both are looked up at every use, so that an import depends on neither.

What is kept can be computed again. So nothing here raises: what cannot be read as it was written is
a miss, and what cannot be written is computed again next time. The digest of a file finds damage
and mix-ups, and is no signature: whoever reads one checks what it says, too.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

log = logging.getLogger("magihuman")

VARIABLE = "MAGIHUMAN_CACHE"
FORMAT = b"magihuman cache 1 "  # of a file, followed by a digest and a newline
# Windows has none of the bits that say who else may write, and shows them all as set.
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH if hasattr(os, "geteuid") else 0
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
NO_WAITING = getattr(os, "O_NONBLOCK", 0)  # for the other end of a pipe
AS_IT_IS = getattr(os, "O_BINARY", 0)  # Windows would change ends of lines
MOST_BYTES = 2**26  # of a file; the largest, timings of TensorRT, have a few million


def read(kind: str, key: str, folder: Path | None = None) -> bytes | None:
    """What was kept of this kind under this key, or None.

    It is None, too, where a file is not what `write` wrote for these arguments, is a link, no file,
    longer than `MOST_BYTES`, somebody else's or such that others may write to it, or lies in a
    folder that others may write to. folder: the folder of this kind, in place of the user's.
    """
    place = folder or folder_of(kind)
    try:
        if place is None or not _is_own(place):
            return None
        whole = _content(_file(place, key))
    except OSError:
        return None
    end = whole.find(b"\n") + 1
    return whole[end:] if whole[:end] == _header(kind, key, whole[end:]) else None


def write(kind: str, key: str, content: bytes, folder: Path | None = None) -> None:
    """Keep content for `read`, whole or not at all; a full or read-only disk is no error.

    key: any name of a file, else `ValueError`. folder: as for `read`; it is created where it is not
    there.
    """
    place = folder or folder_of(kind)
    if place is None:
        return
    if len(content) + len(_header(kind, key, b"")) > MOST_BYTES:
        log.debug("%s is not kept: it has %d bytes", key, len(content))
        return
    try:
        for part in (place.parent, place):
            part.mkdir(0o700, parents=True, exist_ok=True)
        if not _is_own(place):
            _warn(place)
            return
        with atomic_path(_file(place, key), 0o600) as temporary:
            temporary.write_bytes(_header(kind, key, content) + content)
    except OSError as error:
        log.debug("%s is not kept: %s", key, error)


def folder_of(kind: str) -> Path | None:
    """The user's folder for files of a kind, which need not be there; None where no home is known,
    and so nothing is kept.
    """
    named = os.environ.get(VARIABLE)
    try:
        root = Path(named).absolute() if named else platformdirs.user_cache_path("magihuman", False)
    except RuntimeError:
        return None
    return root / kind if root.is_absolute() else None  # earlier releases say "~/.cache" then


@contextmanager
def atomic_path(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A temporary name in the same folder, renamed to `path` on success and removed otherwise.

    mode: of the file, less what the umask takes away.
    """
    temporary = path.parent / f".magihuman-{secrets.token_hex(8)}{path.suffix}"
    # The umask applies by itself; to read it would change it for all threads meanwhile.
    try:
        temporary.touch(mode, exist_ok=False)
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _file(place: Path, key: str) -> Path:
    """The file of a key in a folder; `ValueError` where the key would lead out of it."""
    if key in ("", "..") or Path(key).name != key:
        raise ValueError(f"a key must be a file's name without a folder, got {key!r}")
    return place / key


def _header(kind: str, key: str, content: bytes) -> bytes:
    """The first line of a file: a digest of its content and of what it was kept as."""
    digest = hashlib.sha256(f"{kind}\0{key}\0".encode())
    digest.update(content)
    return FORMAT + digest.hexdigest().encode() + b"\n"


def _content(path: Path) -> bytes:
    """All bytes of a file to which this user alone may write; `OSError` for anything else."""
    descriptor = os.open(path, os.O_RDONLY | NO_LINKS | NO_WAITING | AS_IT_IS)
    try:
        facts = os.fstat(descriptor)
        is_file = stat.S_ISREG(facts.st_mode) and facts.st_size <= MOST_BYTES
        if not is_file or not _is_mine(facts) or facts.st_mode & OTHERS_WRITE:
            raise OSError(f"{path} is no file that was kept")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(MOST_BYTES)
    finally:
        os.close(descriptor)


def _is_own(place: Path) -> bool:
    """Whether this is a folder, not a link to one, to which this user alone may write, in one that
    others cannot put another in its place.
    """
    facts, above = place.lstat(), place.parent.stat()
    is_safe = not above.st_mode & OTHERS_WRITE or bool(above.st_mode & stat.S_ISVTX)
    is_mine = _is_mine(facts) and (_is_mine(above) or above.st_uid == 0)
    return stat.S_ISDIR(facts.st_mode) and is_mine and is_safe and not facts.st_mode & OTHERS_WRITE


def _is_mine(facts: os.stat_result) -> bool:
    """Whether this user is the owner of a file, where the system tells."""
    return not hasattr(os, "geteuid") or facts.st_uid == os.geteuid()


@functools.cache
def _warn(place: Path) -> None:
    """Say once for each folder that nothing is kept there, and why."""
    log.warning(
        "a cache folder must be a folder that its user alone may write to, and %s is not: nothing"
        " is kept there; give it to this user with mode 0700, or name another in %s",
        place,
        VARIABLE,
    )
