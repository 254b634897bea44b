"""What clients send, on its way to the disk, within one bound for all of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from magihuman.runtime.serving.errors import ApiError

PIECE_BYTES = 2**18  # read at once
RETRY_S = 10
READERS = 2  # threads that take bodies apart; more would hold up the one that answers
STRUCTURE_BYTES = 2**14  # of a body beside its texts and files


class Budget:
    """Bytes that uploads may take on the disk until they are decoded. For any thread.

    Attributes:
        turns: of those who take a piece of a body further; for one event loop.
    """

    def __init__(self, limit_bytes: int) -> None:
        """limit_bytes: of all clients together."""
        self.turns = asyncio.Semaphore(READERS)
        self._limit, self._taken = limit_bytes, 0
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """Bytes that are there now."""
        return self._taken

    def check(self, count: int) -> None:
        """Raise `ApiError` where so many bytes would not be free now."""
        if self._taken + count > self._limit:
            raise _full()

    def take(self, count: int) -> None:
        """Count so many bytes more, or raise `ApiError`."""
        with self._lock:
            self.check(count)
            self._taken += count

    def give(self, count: int) -> None:
        """Count so many bytes less."""
        with self._lock:
            self._taken -= count


class Spool:
    """A file without a name, for what comes from a client; gone once it is closed or forgotten."""

    def __init__(self, folder: Path, budget: Budget) -> None:
        """Open it on the disk of a folder. Raises `OSError`."""
        self._size, self._budget, self._is_open = 0, budget, True
        self._lock = threading.Lock()  # whoever has waited for it to be written may give it up
        self._file = TemporaryFile(dir=folder, prefix=".magihuman-")  # noqa: SIM115 - see `close`

    def write(self, content: bytes | bytearray | memoryview) -> None:
        """Append. Raises `ApiError` where the budget is used up, `OSError` where the disk is."""
        with self._lock:
            if not self._is_open:
                raise ValueError("the client has gone")
            self._budget.take(len(content))
            self._size += len(content)
            self._file.write(content)

    def pieces(self) -> Iterator[bytes]:
        """Yield all that has been written."""
        self._file.seek(0)
        while piece := self._file.read(PIECE_BYTES):
            yield piece

    def close(self) -> None:
        """Remove it. May be called again."""
        with self._lock:
            if self._is_open:
                self._is_open = False
                self._budget.give(self._size)
                self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # else it could not be opened
            self.close()


@dataclass(frozen=True)
class Shape:
    """What a body may look like, a form as well as JSON.

    Attributes:
        files: the names of fields that may be files, without what may follow in brackets.
        fields: how many fields there may be.
        text_bytes: of one text as it is sent; longer ones are not kept in memory.
        spool: makes a place for a file or a long text.
        most_files: that a body may have.
    """

    files: tuple[str, ...]
    fields: int
    text_bytes: int
    spool: Callable[[], Spool]
    most_files: int = 2

    @property
    def all_text_bytes(self) -> int:
        """Bytes of all texts that are kept in memory: two prompts, and small files as data URLs."""
        return 4 * self.text_bytes


@dataclass(frozen=True)
class Sent:
    """What is on the disk of a field.

    Attributes:
        kind: "file" or "text" of a form, or "json": a string with its escapes.
    """

    spool: Spool
    kind: str


TOO_LONG = object()  # a text that was not kept
Fields = list[tuple[str, object]]  # a name, and a `Sent`, `TOO_LONG`, a text or a value of JSON


def _full() -> ApiError:
    return ApiError(
        429,
        "uploads_full",
        "as many bytes are being uploaded as may, by all clients together; try again later",
        headers={"Retry-After": str(RETRY_S)},
    )
