"""The routes: how the server is, and videos."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.responses import FileResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from magihuman.runtime.serving import uploads
from magihuman.runtime.serving.errors import ApiError, disk_taken, found, no_video, refused, retry
from magihuman.runtime.serving.jobs import Draining, Jobs, LineFull
from magihuman.runtime.serving.metrics import Metrics
from magihuman.runtime.serving.schema import (
    Deleted,
    Health,
    VideoObject,
    body_schema,
    errors_of,
)
from magihuman.runtime.serving.settings import Settings
from magihuman.runtime.serving.storage.files import StorageError
from magihuman.runtime.serving.store import Job, Status
from magihuman.runtime.serving.transfer.spool import Budget
from magihuman.runtime.serving.transfer.stills import Stills
from magihuman.runtime.serving.transfer.stored import check_there, download

DRAIN_RETRY_S = 30
BODY_S = 300.0  # for a body, which has a place in line meanwhile; 32 MiB at 0.9 Mbit/s

Variant = Literal["video", "thumbnail", "spritesheet"]
Check = Callable[..., Awaitable[None]]  # a dependency of FastAPI's, which raises `ApiError`


async def health() -> Health:
    """Whether the server answers."""
    return Health(status="ok")


@dataclass(frozen=True)
class ServerRoutes:
    """How the server is.

    The docstrings of routes are what clients read in the OpenAPI description.

    Attributes:
        jobs, metrics: asked at each request, since the application can be made before them.
        is_ready: whether an engine runs.
    """

    jobs: Callable[[], Jobs]
    is_ready: Callable[[], Awaitable[bool]]
    metrics: Callable[[], Metrics]

    def add_to(self, app: FastAPI, check: Check) -> None:
        """Bind the routes. check: the token's, of those that are not for everybody."""
        app.get("/health", response_model=Health, tags=["server"])(health)
        app.get(
            "/ready", response_model=Health, responses={503: {"model": Health}}, tags=["server"]
        )(self.ready)
        app.get(
            "/metrics",
            response_class=Response,
            responses={200: {"content": {"text/plain": {}}}, **errors_of(401)},
            tags=["server"],
            dependencies=[Depends(check)],
        )(self.prometheus)

    async def ready(self, response: Response) -> Health:
        """Whether an engine is loaded and new videos are taken."""
        if self.jobs().is_draining:
            response.status_code = 503
            return Health(status="draining")
        if not await self.is_ready():
            response.status_code = 503
            return Health(status="starting")
        return Health(status="ok")

    async def prometheus(self) -> Response:
        """For Prometheus."""
        return Response(self.metrics().text(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@dataclass(frozen=True)
class VideoRoutes:
    """Videos: asked for, looked at, fetched, removed.

    The docstrings of routes are what clients read in the OpenAPI description.

    Attributes:
        jobs: asked at each request, since the application can be made before them.
        budget: of what is being uploaded.
        stills: images of finished videos.
    """

    settings: Settings
    jobs: Callable[[], Jobs]
    budget: Budget
    stills: Stills = field(default_factory=lambda: Stills(uploads.DECODERS))

    def add_to(self, app: FastAPI, check: Check) -> None:
        """Bind the routes, all behind the token's check."""
        closed: dict[str, Any] = {"tags": ["videos"], "dependencies": [Depends(check)]}
        app.post(
            "/v1/videos",
            response_model=VideoObject,
            responses=errors_of(400, 401, 403, 404, 408, 413, 415, 422, 429, 503),
            openapi_extra={"requestBody": body_schema(self.settings)},
            **closed,
        )(self.create)
        app.get(
            "/v1/videos/{video_id}",
            response_model=VideoObject,
            responses=errors_of(401, 404, 422),
            **closed,
        )(self.retrieve)
        mp4: dict[str, Any] = {"video/mp4": {}}
        webp: dict[str, Any] = {"image/webp": {}}
        app.get(
            "/v1/videos/{video_id}/content",
            response_class=FileResponse,
            responses={
                200: {"content": {**mp4, **webp}, "description": "The mp4, or an image of it."},
                206: {"content": {**mp4, **webp}, "description": "A part, by the header Range."},
                **errors_of(401, 404, 409, 422, 503),
            },
            **closed,
        )(self.content)
        app.head("/v1/videos/{video_id}/content", include_in_schema=False, **closed)(self.content)
        app.delete(
            "/v1/videos/{video_id}",
            response_model=Deleted,
            responses=errors_of(401, 403, 404, 422, 503),
            **closed,
        )(self.delete)

    async def create(self, request: Request) -> VideoObject:
        """Ask for a video; it waits in line."""
        return VideoObject.of(await self.added(request), self.settings.model)

    async def added(self, request: Request) -> Job:
        """Put what a body asks for in line. Raises `ApiError` where it cannot be."""
        with disk_taken():
            with _place_in_line(self.jobs()):
                new = await _read(request, self.settings, self.budget)
            try:
                await self.jobs().add(new.job, new.fill)
            except Exception:  # where the client has gone, it is added all the same
                new.close()
                raise
        return new.job

    async def retrieve(self, video_id: str) -> VideoObject:
        """A video's status and progress."""
        return VideoObject.of(await found(self.jobs(), video_id), self.settings.model)

    async def content(
        self,
        video_id: str,
        variant: Annotated[
            Variant, Query(description="The mp4, a frame of it, or sixteen.")
        ] = "video",
    ) -> Response:
        """The finished mp4, whole or in ranges; or an image of it, as WebP."""
        job = await found(self.jobs(), video_id)
        if job.status is not Status.COMPLETED:
            wait = None if job.has_ended else retry(self.jobs().retry_after_s)
            raise ApiError(
                409,
                "not_completed",
                f"the video must be completed, and is {job.status.value}",
                "video_id",
                headers=wait,
            )
        video = self.jobs().video(job)
        try:
            if variant == "video":
                return await download(video, "video/mp4", f"{job.id}.mp4")
            await check_there(video)
            with disk_taken():
                image = await self.stills.of(video, variant)
            return await download(image, "image/webp", f"{job.id}-{variant}.webp")
        except FileNotFoundError:  # removed by hand
            raise no_video() from None
        except StorageError as error:
            raise refused(error) from error

    async def delete(self, video_id: str) -> Deleted:
        """Cancel a video that waits or is being made, or remove a finished one."""
        job = await found(self.jobs(), video_id)
        with disk_taken():
            await self.jobs().remove(job)
        return Deleted(id=job.id)


async def _read(request: Request, settings: Settings, budget: Budget) -> uploads.NewVideo:
    """Read a body within `BODY_S`. Raises `ApiError` for whatever is wrong with it."""
    try:
        async with asyncio.timeout(BODY_S):
            return await uploads.read(request, settings, budget)
    except TimeoutError:
        message = f"the body must be sent within {BODY_S:g} s; send a smaller image or sound"
        raise ApiError(408, "body_too_slow", message) from None
    except ClientDisconnect:  # nobody is told, and it is no fault of the server
        raise ApiError(400, "malformed_body", "the body must be sent to its end") from None


@contextmanager
def _place_in_line(jobs: Jobs) -> Iterator[None]:
    """Keep a place in line while a body is read. Raises `ApiError` where there is none."""
    try:
        with jobs.arriving():
            yield
    except LineFull:
        message = "as many videos wait as may; try again later"
        wait = retry(jobs.retry_after_s)
        raise ApiError(429, "queue_full", message, headers=wait) from None
    except Draining:
        raise draining() from None


def draining() -> ApiError:
    """Return the error of a server that is about to stop."""
    message = "the server is about to stop and takes no more; try again later"
    return ApiError(503, "draining", message, headers=retry(DRAIN_RETRY_S))
