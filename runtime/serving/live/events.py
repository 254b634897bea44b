"""How far a video is, as server-sent events, each of which has all of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping

from pydantic import BaseModel, Field

from magihuman.runtime.serving.live.watching import Watching
from magihuman.runtime.serving.schema import JobError
from magihuman.runtime.serving.store import Status

MEDIA_TYPE = "text/event-stream"
HEARTBEAT_S = 15.0
RETRY_MS = 2000  # after which a client whose connection has ended comes again
BEAT = b": still here\n\n"


class VideoState(BaseModel):
    """How far a video is; the data of an event."""

    id: str
    status: Status
    progress: int = Field(description="Percent.")
    stage: str | None = Field(description="What the engine is doing.")
    step: int = Field(description="Steps of the stage that are finished.")
    steps: int = Field(description="Steps that the stage has, 0 where it has none.")
    frames: int = Field(description="Frames that are decoded and can be streamed.")
    place: int | None = Field(description="In line, from 1; null where the video does not wait.")
    seconds_left: float | None = Field(description="About; null where that is not known.")
    error: JobError | None


class Events(Watching):
    """Events of a job until it ends: queued, progress, window, completed, failed and deleted.

    The first has the state at the moment, whatever the client has had before. A slow client gets
    fewer events, and not older ones.
    """

    def fields(self) -> Mapping[str, str]:
        """Return the headers."""
        return {"Content-Type": f"{MEDIA_TYPE}; charset=utf-8"}

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield an event for each change, and something now and then where there is none."""
        yield f"retry: {RETRY_MS}\n\n".encode()
        before: VideoState | None = None
        number = 0
        while not self.is_gone:
            state = self._state()
            kinds = list(changes(before, state))
            for kind in kinds:
                number += 1
                yield event(kind, state, number)
            before = state
            if self.job.has_ended or self.is_left:
                return
            if not kinds and not await self._has_changed():
                yield BEAT
        yield encoded("deleted", "deleted", f'{{"id":"{self.job.id}","deleted":true}}')

    async def _has_changed(self) -> bool:
        """Wait for a change, though not for ever."""
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                await self.jobs.changed(self.job)
        except TimeoutError:
            return False
        return True

    def _state(self) -> VideoState:
        job, jobs = self.job, self.jobs
        attempt = None if job.has_ended else jobs.attempt(job)
        left_s = jobs.seconds_left(job)
        return VideoState(
            id=job.id,
            status=job.status,
            progress=job.progress,
            stage=job.stage,
            step=attempt.step if attempt else 0,
            steps=attempt.of if attempt else 0,
            frames=attempt.frames if attempt else 0,
            place=jobs.place(job),
            seconds_left=None if left_s is None else round(left_s, 1),
            error=None if job.error is None else JobError(**job.error),
        )


def changes(before: VideoState | None, now: VideoState) -> Iterator[str]:
    """Yield the kinds of the events that tell what has become of a state."""
    if now.status in (Status.COMPLETED, Status.FAILED):
        yield now.status.value
    elif now.status is Status.QUEUED:
        if before is None or (before.status, before.place) != (now.status, now.place):
            yield "queued"
    else:
        if before is None or _steps(before) != _steps(now):
            yield "progress"
        if now.frames > (0 if before is None else before.frames):
            yield "window"


def _steps(state: VideoState) -> tuple[object, ...]:
    return state.status, state.stage, state.step, state.steps, state.progress


def event(kind: str, state: VideoState, number: int) -> bytes:
    """Return an event. The last of a job has its status for an id, which a client sends again."""
    is_last = kind == state.status.value and state.status is not Status.QUEUED
    return encoded(kind, kind if is_last else str(number), state.model_dump_json())


def encoded(kind: str, name: str, data: str) -> bytes:
    """Return an event as it is sent; the data is one line."""
    return f"id: {name}\nevent: {kind}\ndata: {data}\n\n".encode("utf-8", "backslashreplace")
