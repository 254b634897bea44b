"""Files of videos by fsspec, each there whole or not at all: `video_0123.../video-1.mp4`."""

from __future__ import annotations

import errno
import functools
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

from magihuman.runtime.errors import InvalidRequestError, MissingExtraError
from magihuman.runtime.files import sync

PIECE_BYTES = 2**20  # read at once
DRAFT = ".magihuman-"
# Those where a file is there once all of it has come; of others a file is moved to its name.
OBJECTS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss"}

P = ParamSpec("P")
R = TypeVar("R")


class StorageError(OSError):
    """The storage does not take or give a file. `strerror` says why."""

    place = "storage"


def guarded(call: Callable[P, R]) -> Callable[P, R]:
    """Raise `StorageError` in place of what a library of some storage raises.

    `FileNotFoundError` stays.
    """

    @functools.wraps(call)
    def guard(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return call(*args, **kwargs)
        except (FileNotFoundError, StorageError):
            raise
        except OSError as error:
            number, reason = error.errno or errno.EIO, error.strerror or str(error)
            raise StorageError(number, reason) from error
        except Exception as error:  # each storage has errors of its own
            raise StorageError(errno.EIO, f"{type(error).__name__}: {error}") from error

    return guard


class Storage:
    """Files below one URL. For any thread, and not for a thread with an event loop."""

    def __init__(self, url: str) -> None:
        """url: of a folder; a path is one on the disk. Nothing is asked of it yet.

        Raises:
            InvalidRequestError: it cannot be used.
            MissingExtraError: a library for it is not installed.
        """
        self.url = url
        self._fs, self._root, kind = _opened(url)
        self._are_objects, self._is_local = kind in OBJECTS, kind in ("file", "local")

    @guarded
    def check(self) -> None:
        """Write a file and remove it. Raises `StorageError` where that cannot be done."""
        name = self._place(f"{DRAFT}{secrets.token_hex(4)}")
        if not self._are_objects:
            self._fs.makedirs(self._root, exist_ok=True)
        self._fs.pipe_file(name, b"magihuman")
        self._fs.rm_file(name)

    @guarded
    def put(self, source: Path, name: str) -> None:
        """Copy a file from this machine's disk, in place of one that is there."""
        target = self._place(name)
        if self._are_objects:
            self._fs.put_file(os.fspath(source), target)
            return
        folder, _, last = target.rpartition("/")
        draft = f"{folder}/{DRAFT}{secrets.token_hex(4)}-{last}"
        self._fs.makedirs(folder, exist_ok=True)
        try:
            self._fs.put_file(os.fspath(source), draft)
            if self._is_local:
                sync(Path(draft))
            self._fs.mv(draft, target)
        except BaseException:
            with suppress(Exception):
                self._fs.rm_file(draft)
            raise

    @guarded
    def get(self, name: str, target: Path) -> None:
        """Copy a file to this machine's disk. Raises `FileNotFoundError` where there is none."""
        self._fs.get_file(self._place(name), os.fspath(target))

    @guarded
    def size(self, name: str) -> int:
        """Return the bytes of a file. Raises `FileNotFoundError` where there is none."""
        return int(self._fs.info(self._place(name))["size"])

    @guarded
    def read(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes of a file from one place to before another."""
        return bytes(self._fs.cat_file(self._place(name), start=start, end=end))

    @guarded
    def names(self, folder: str) -> set[str]:
        """Return the names of the files in a folder; none where there is no folder."""
        try:
            found = self._fs.ls(self._place(folder), detail=False)
        except FileNotFoundError:
            return set()
        names = {place.rstrip("/").rpartition("/")[2] for place in found}
        return {name for name in names if not name.startswith(DRAFT)}

    @guarded
    def remove(self, folder: str) -> None:
        """Remove a folder with all files in it, if it is there."""
        with suppress(FileNotFoundError):
            self._fs.rm(self._place(folder), recursive=True)

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}"


@dataclass(frozen=True)
class Stored:
    """A file of a storage.

    Attributes:
        name: below the storage's URL.
    """

    storage: Storage
    name: str

    def beside(self, name: str) -> Stored:
        """Return another file of the same folder."""
        return Stored(self.storage, f"{self.name.rpartition('/')[0]}/{name}")

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from one place to before another. Raises `StorageError`."""
        while start < end:
            piece = self.storage.read(self.name, start, min(end, start + PIECE_BYTES))
            if not piece:
                raise StorageError(errno.EIO, "a file is shorter than it was")
            yield piece
            start += len(piece)


def _opened(url: str) -> tuple[Any, str, str]:
    """Return the file system of a URL, the path in it, and its kind."""
    kind = urlsplit(url).scheme if "://" in url else "file"
    with _imported(url):
        from fsspec.core import url_to_fs

        options = {} if kind == "file" else {"use_listings_cache": False}
        fs, root = url_to_fs(url, **options)
    root = str(root).rstrip("/")
    if not root:
        raise InvalidRequestError(
            f"the storage must be a folder, a bucket or a folder of one, got {url}; name one"
        )
    return fs, root, kind


@contextmanager
def _imported(url: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None) or "a library"
        raise MissingExtraError(f"storage at {url}", "cluster", missing) from error
    except ValueError as error:
        raise InvalidRequestError(
            f"the storage must be a folder or a URL that fsspec knows, as s3://bucket/folder, got"
            f" {url}: {error}"
        ) from error
