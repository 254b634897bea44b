"""A file that a client fetches, as fast as it does, unless that is too slow."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import anyio
from starlette.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

log = logging.getLogger("magihuman")

STALL_S = 30.0  # for the next piece, of 64 KiB, to be taken
BYTES_PER_S = 16 * 1024  # that a client takes at least, on the average since the beginning


class Download(FileResponse):
    """A file as it is now, whole or in ranges, whatever becomes of its name meanwhile.

    It is read piece by piece, the next one when the one before has been taken. A client that takes
    less than `BYTES_PER_S`, or nothing for `STALL_S`, is dropped.
    """

    def __init__(self, path: Path, media_type: str, name: str) -> None:
        """Open the file. Raises `OSError`."""
        self._file = path.open("rb")
        number = self._file.fileno()
        super().__init__(
            f"/dev/fd/{number}",
            media_type=media_type,
            filename=name,
            stat_result=os.fstat(number),
            content_disposition_type="inline",
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with it, as ASGI has it."""
        try:
            await super().__call__(scope, receive, paced(send))
        except TimeoutError:  # the server closes a connection whose answer has not come to its end
            log.warning("%s is fetched too slowly, and the client is dropped", self.filename)
        finally:
            self._file.close()


def paced(send: Send) -> Send:
    """Return `send` with a time for each message. It raises `TimeoutError`.

    What counts is the time in which the client has something to take.
    """
    waited_s, taken = 0.0, 0

    async def timed(message: Message) -> None:
        nonlocal waited_s, taken
        start_s = anyio.current_time()
        left_s = STALL_S + taken / BYTES_PER_S - waited_s
        with anyio.fail_after(min(STALL_S, left_s)):
            await send(message)
        waited_s += anyio.current_time() - start_s
        taken += len(message.get("body", b""))

    return timed
