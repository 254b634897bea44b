"""`POST /v1/videos/sync`: a video made while its client waits, as vLLM-Omni has it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse

from magihuman.runtime.serving.errors import ApiError
from magihuman.runtime.serving.routes import VideoRoutes, draining
from magihuman.runtime.serving.schema import body_schema, errors_of
from magihuman.runtime.serving.store import Job, Status
from magihuman.runtime.serving.transfer.stored import download

log = logging.getLogger("magihuman")

STATUSES = {"invalid_request": 422, "deadline_exceeded": 504}  # of failures; of all others 500


@dataclass(frozen=True)
class SyncRoute:
    """A video that is asked for and fetched at once. videos: where it is put in line."""

    videos: VideoRoutes

    def add_to(self, app: FastAPI, check: Callable[..., Awaitable[None]]) -> None:
        """Bind the route, behind the token's check."""
        app.post(
            "/v1/videos/sync",
            response_class=FileResponse,
            responses={
                200: {"content": {"video/mp4": {}}, "description": "The mp4."},
                **errors_of(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504),
            },
            openapi_extra={"requestBody": body_schema(self.videos.settings)},
            tags=["videos"],
            dependencies=[Depends(check)],
        )(self.make)

    async def make(self, request: Request) -> Response:
        """Make a video and answer with its mp4; a client that leaves cancels it."""
        job = await self.videos.added(request)
        await self._wait(request, job)
        jobs = self.videos.jobs()
        if job.status is Status.FAILED and job.error is not None:
            code = job.error["code"]
            raise ApiError(STATUSES.get(code, 500), code, job.error["message"])
        if jobs.get(job.id) is None:
            raise ApiError(404, "video_not_found", "the video was removed while it was made")
        if job.status is not Status.COMPLETED:
            raise draining()
        answer = await download(jobs.video(job), "video/mp4", f"{job.id}.mp4")
        answer.headers.update(self._figures(job))
        return answer

    async def _wait(self, request: Request, job: Job) -> None:
        """Return once the job has ended. Where the client leaves before, the job is removed."""
        jobs = self.videos.jobs()
        ended = asyncio.create_task(jobs.ended(job))
        left = asyncio.create_task(_left(request))
        try:
            await asyncio.wait([ended, left], return_when=asyncio.FIRST_COMPLETED)
            if not ended.done() and jobs.get(job.id) is not None:
                await jobs.remove(job)
        except OSError:
            log.exception("%s has no client any more, and cannot be removed", job.id)
        finally:
            ended.cancel()
            left.cancel()

    def _figures(self, job: Job) -> dict[str, str]:
        """Return how the video was made, as headers."""
        model = job.model or self.videos.settings.model
        return {
            "X-Request-Id": job.id,
            "X-Model": model.encode("ascii", "backslashreplace").decode(),
            "X-Inference-Time-S": f"{job.inference_time_s or 0:.3f}",
            "X-Stage-Durations": json.dumps(job.timings_s, separators=(",", ":")),
            "X-Peak-Memory-MB": f"{job.peak_memory_mb or 0:.3f}",
        }


async def _left(request: Request) -> None:
    """Return once the client has gone; the body has been read by then."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
