"""The routes of what can be seen of a video while it is made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Response

from magihuman.runtime.serving.errors import found
from magihuman.runtime.serving.jobs import Jobs
from magihuman.runtime.serving.live import events, stream
from magihuman.runtime.serving.live.watching import Watchers
from magihuman.runtime.serving.schema import ErrorBody
from magihuman.runtime.serving.store import Status

Check = Callable[..., Awaitable[None]]  # a dependency of FastAPI's, which raises `ApiError`
LastEvent = Annotated[str | None, Header(alias="Last-Event-ID")]


@dataclass(frozen=True)
class LiveRoutes:
    """A video's stream and its events.

    The docstrings of routes are what clients read in the OpenAPI description.

    Attributes:
        jobs: asked at each request, since the application can be made before them.
    """

    jobs: Callable[[], Jobs]
    watchers: Watchers = field(default_factory=Watchers)

    def add_to(self, app: FastAPI, check: Check) -> None:
        """Bind the routes, all behind the token's check."""
        closed: dict[str, Any] = {"tags": ["videos"], "dependencies": [Depends(check)]}
        errors: dict[int | str, dict[str, Any]] = {
            status: {"model": ErrorBody} for status in (401, 404, 409, 422, 503)
        }
        fragments = {"content": {stream.MEDIA_TYPE: {}}, "description": "Fragmented mp4."}
        app.get(
            "/v1/videos/{video_id}/stream",
            response_class=Response,
            responses={200: fragments, **errors},
            **closed,
        )(self.stream)
        app.head("/v1/videos/{video_id}/stream", include_in_schema=False, **closed)(
            self.stream_head
        )
        lines = {
            "content": {events.MEDIA_TYPE: {}},
            "description": "Events, with a `VideoState` as JSON each.",
        }
        ended = {"description": "It has ended, and the client has been told so."}
        app.get(
            "/v1/videos/{video_id}/events",
            response_class=Response,
            responses={200: lines, 204: ended, **errors},
            **closed,
        )(self.events)

    async def stream(self, video_id: str) -> Response:
        """The video while it is made, as fragmented mp4, from its beginning."""
        return stream.LiveStream(self.jobs(), await found(self.jobs(), video_id), self.watchers)

    async def stream_head(self, video_id: str) -> Response:
        """Whether there is a stream, without waiting for it."""
        job = await found(self.jobs(), video_id)
        stream.refuse(job)
        is_kept = job.status is not Status.COMPLETED or self.jobs().live(job).is_file()
        if not self.jobs().has_live or not is_kept:
            raise stream.not_live()
        return Response(headers={**stream.UNRANGED, "Content-Type": stream.MEDIA_TYPE})

    async def events(self, video_id: str, last_event_id: LastEvent = None) -> Response:
        """How far the video is, as server-sent events, until it ends."""
        job = await found(self.jobs(), video_id)
        if job.has_ended and last_event_id == job.status.value:
            return Response(status_code=204)  # the client comes no more
        return events.Events(self.jobs(), job, self.watchers)
