"""A video while it is made: the fragments that are there, and each further one when it is."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping
from typing import BinaryIO

from magihuman.runtime.serving.errors import ApiError
from magihuman.runtime.serving.line.attempt import Attempt
from magihuman.runtime.serving.live.watching import Watching
from magihuman.runtime.serving.store import Job, Status

MEDIA_TYPE = "video/mp4"
PIECE_BYTES = 64 * 1024
HEAD_BYTES = 4096  # of the file, in which the encoders say what they are
AAC_LC = "mp4a.40.2"
# It has no length to take parts of, and says so; a Range is answered with the whole.
UNRANGED = {"Accept-Ranges": "none"}


class LiveStream(Watching):
    """Fragmented mp4, from the beginning, whenever the client comes.

    It ends with the job, or with the attempt at it; the job's record says whether that was all.
    """

    _head = b""

    def fields(self) -> Mapping[str, str]:
        """Return the headers, the codecs among them."""
        return {**UNRANGED, "Content-Type": media_type(self._head)}

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the file as it grows. Raises `ApiError` where there is and will be none."""
        attempt, file = await self._opened()
        with file:
            self._head = os.pread(file.fileno(), HEAD_BYTES, 0)
            sent = 0
            while True:
                while sent < attempt.live_bytes:
                    size = min(PIECE_BYTES, attempt.live_bytes - sent)
                    piece = await asyncio.to_thread(os.pread, file.fileno(), size, sent)
                    if not piece:  # it has been cut by hand
                        return
                    yield piece
                    sent += len(piece)
                if not self._is_going_on(attempt):
                    return
                await self.jobs.changed(self.job)

    def _is_going_on(self, attempt: Attempt) -> bool:
        if self.is_gone or not self.job.is_running:
            return False
        return self.jobs.attempt(self.job) is attempt

    async def _opened(self) -> tuple[Attempt, BinaryIO]:
        """Wait for the first fragment, and open the file."""
        while True:
            if self.is_gone:
                raise ApiError(404, "video_not_found", "the video has been removed", "video_id")
            refuse(self.job)
            if not self.jobs.has_live:
                raise not_live()
            if self.is_left:
                raise ApiError(503, "draining", "the server is about to stop; try again later")
            if self.job.status is Status.COMPLETED:
                file = self._open()
                return Attempt(live_bytes=os.fstat(file.fileno()).st_size), file
            attempt = self.jobs.attempt(self.job)
            if attempt.live_bytes:
                return attempt, self._open()
            await self.jobs.changed(self.job)

    def _open(self) -> BinaryIO:
        try:
            return self.jobs.live(self.job).open("rb")
        except FileNotFoundError:
            raise not_live() from None


def refuse(job: Job) -> None:
    """Raise `ApiError` where nothing can be seen of a job any more."""
    if job.status is Status.FAILED:
        reason = "" if job.error is None else f": {job.error['message']}"
        raise ApiError(409, "not_live", f"the video has failed{reason}", "video_id")


def not_live() -> ApiError:
    """Return the error of a video whose fragments have not been kept."""
    message = "nothing was kept of how this video was made; fetch its content once it is completed"
    return ApiError(409, "not_live", message, "video_id")


def media_type(head: bytes) -> str:
    """Return the type of a file that begins so, with its codecs, as Media Source wants it."""
    found = head.find(b"avcC")
    if found < 0 or len(head) < found + 8:
        return MEDIA_TYPE
    return f'{MEDIA_TYPE}; codecs="avc1.{head[found + 5 : found + 8].hex()}, {AAC_LC}"'
