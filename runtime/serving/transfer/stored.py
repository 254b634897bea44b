"""A file of the storage that a client fetches, whole or a range of it, piece by piece."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from pathlib import Path

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from magihuman.runtime.serving.storage.files import Stored
from magihuman.runtime.serving.transfer.download import Download, paced

log = logging.getLogger("magihuman")

RANGE = re.compile(r"bytes=\s*(\d{0,19})-(\d{0,19})\s*", re.IGNORECASE)


class StoredDownload(Response):
    """A file of the storage. Of several ranges, which HTTP lets a server ignore, all is sent.

    No more than a piece of it is in memory. A client that is too slow is dropped, as by `Download`.
    """

    def __init__(self, source: Stored, size: int, media_type: str, name: str) -> None:
        """size: of the file, in bytes."""
        super().__init__(media_type=media_type)
        self._source, self._size, self._name = source, size, name
        digest = hashlib.sha256(f"{source.name} {size}".encode()).hexdigest()[:32]
        self.headers.update(
            {
                "accept-ranges": "bytes",
                "content-length": str(size),
                "content-disposition": f'inline; filename="{name}"',
                "etag": f'"{digest}"',
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with it, as ASGI has it."""
        asked = {name: value.decode("latin-1") for name, value in scope["headers"]}
        start, end = self._range(asked.get(b"range"), asked.get(b"if-range"))
        if self.status_code == 416:
            start = end = 0
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        if scope["method"] == "HEAD":
            end = start
        try:
            await self._send(paced(send), start, end)
        except TimeoutError:  # the server closes a connection whose answer has not come to its end
            log.warning("%s is fetched too slowly, and the client is dropped", self._name)
        except OSError as error:  # the same
            log.warning("%s cannot be read to its end: %s", self._source.name, error)

    async def _send(self, send: Send, start: int, end: int) -> None:
        """Send the body, and its end with the last of it: a client may then ask again at once."""
        if start == end:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        pieces = self._source.pieces(start, end)
        while start < end:
            piece = await asyncio.to_thread(next, pieces)
            start += len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": start < end})

    def _range(self, asked: str | None, condition: str | None) -> tuple[int, int]:
        """Return what to send, from where to before where, and set the status and headers of it."""
        whole = 0, self._size
        found = None if asked is None else RANGE.fullmatch(asked)
        if found is None or not any(found.groups()):
            return whole
        if condition is not None and condition != self.headers["etag"]:
            return whole
        first, last = found.groups()
        if not first:
            start, end = max(0, self._size - int(last)), self._size
        else:
            start, end = int(first), min(self._size, int(last) + 1 if last else self._size)
            if last and int(last) < start:
                return whole
        if start >= end:
            self.status_code = 416
            self.headers["content-range"] = f"bytes */{self._size}"
            self.headers["content-length"] = "0"
            return whole
        self.status_code = 206
        self.headers["content-range"] = f"bytes {start}-{end - 1}/{self._size}"
        self.headers["content-length"] = str(end - start)
        return start, end


async def download(source: Path | Stored, media_type: str, name: str) -> Response:
    """Return the answer with a file. Raises `FileNotFoundError`, or another `OSError`."""
    if isinstance(source, Path):
        return Download(source, media_type, name)
    size = await asyncio.to_thread(source.storage.size, source.name)
    return StoredDownload(source, size, media_type, name)


async def check_there(source: Path | Stored) -> None:
    """Raise `FileNotFoundError` where a file is not there, or another `OSError`."""
    if isinstance(source, Path):
        source.lstat()
    else:
        await asyncio.to_thread(source.storage.size, source.name)
