"""`GET /v1/videos`: the videos, page by page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Depends, FastAPI, Query

from magihuman.runtime.serving.errors import ApiError, disk_taken
from magihuman.runtime.serving.jobs import Jobs
from magihuman.runtime.serving.schema import VideoList, VideoObject, errors_of
from magihuman.runtime.serving.settings import Settings

PAGE, MAX_PAGE = 20, 100

After = Annotated[str | None, Query(description="The last id of the page before.")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Videos of a page.")]
Order = Annotated[Literal["asc", "desc"], Query(description="By when they were asked for.")]


@dataclass(frozen=True)
class ListRoutes:
    """Pages of videos. jobs: asked at each request."""

    settings: Settings
    jobs: Callable[[], Jobs]

    def add_to(self, app: FastAPI, check: Callable[..., Awaitable[None]]) -> None:
        """Bind the route, behind the token's check."""
        app.get(
            "/v1/videos",
            response_model=VideoList,
            responses=errors_of(401, 404, 422),
            tags=["videos"],
            dependencies=[Depends(check)],
        )(self.page)

    async def page(
        self, after: After = None, limit: Limit = PAGE, order: Order = "desc"
    ) -> VideoList:
        """The videos that are kept, the newest first."""
        jobs = self.jobs()
        with disk_taken():
            await jobs.catch_up()
        last = None if after is None else jobs.get(after)
        if after is not None and last is None:
            message = "after must be the id of a video that is there; begin at the first page again"
            raise ApiError(404, "video_not_found", message, "after")
        found, has_more = jobs.page(last, limit, newest_first=order == "desc")
        return VideoList(
            data=[VideoObject.of(job, self.settings.model) for job in found],
            first_id=found[0].id if found else None,
            last_id=found[-1].id if found else None,
            has_more=has_more,
        )
