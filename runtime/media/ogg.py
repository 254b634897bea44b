"""Chained Ogg files: several streams one after the other, each with its own headers (RFC 3533)."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

CAPTURE = b"OggS"
HEADER = 27  # bytes of a page before its table of segments
BEGINS = 2  # the flag of a page that begins a logical stream


def links(path: Path) -> list[tuple[int, int]]:
    """Where each link of the chain begins and ends, in bytes; empty for what is no Ogg file.

    A link begins with pages that begin streams, after one that does not. What lies between pages
    belongs to the link before. Raises `OSError`.
    """
    with path.open("rb") as file:
        if file.read(len(CAPTURE)) != CAPTURE:
            return []
        end = file.seek(0, os.SEEK_END)
        starts, was_beginning = [], False
        for at, is_beginning in _pages(file):
            if is_beginning and not was_beginning:
                starts.append(at)
            was_beginning = is_beginning
    if not starts:
        return []
    return list(zip([0, *starts[1:]], [*starts[1:], end], strict=True))


def _pages(file: BinaryIO) -> Iterator[tuple[int, bool]]:
    """Each page's place, and whether it begins a stream; up to the first damage."""
    at = 0
    while True:
        file.seek(at)
        header = file.read(HEADER)
        if len(header) < HEADER or not header.startswith(CAPTURE):
            return
        lacing = file.read(header[26])
        yield at, bool(header[5] & BEGINS)
        at += HEADER + len(lacing) + sum(lacing)


class Span(io.RawIOBase):
    """Some bytes of a file, read as if they were all of it."""

    def __init__(self, path: Path, start: int, end: int) -> None:
        """Raises `OSError`."""
        self._file = path.open("rb")
        self._start, self._length, self._at = start, end - start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._start + self._at)
        content = self._file.read(left if size < 0 else min(size, left))
        self._at += len(content)
        return content

    def close(self) -> None:
        self._file.close()
        super().close()
