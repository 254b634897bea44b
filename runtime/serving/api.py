"""The HTTP side: routes, limits, the token, the page. Knows jobs, and no engine."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from magihuman.runtime.files import version
from magihuman.runtime.serving import uploads
from magihuman.runtime.serving.errors import ApiError, invalid, too_large
from magihuman.runtime.serving.jobs import Draining, Jobs, LineFull
from magihuman.runtime.serving.metrics import Metrics
from magihuman.runtime.serving.schema import (
    Deleted,
    ErrorBody,
    Health,
    VideoObject,
    body_schema,
)
from magihuman.runtime.serving.settings import Settings
from magihuman.runtime.serving.store import Job, Status

# The page is one file, loads nothing, and may ask this server alone.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self';"
    " img-src 'self' blob: data:; media-src 'self' blob:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)
DRAIN_RETRY_S = 30
BODY_S = 300.0  # for a body, which has a place in line meanwhile; 32 MiB at 0.9 Mbit/s
BEARER = HTTPBearer(auto_error=False, description="The server's token, where it has one.")


def create_app(
    settings: Settings,
    jobs: Callable[[], Jobs],
    is_ready: Callable[[], Awaitable[bool]],
    metrics: Callable[[], Metrics],
) -> FastAPI:
    """The ASGI application.

    jobs, metrics: asked at each request, since the application can be made before them. is_ready:
    whether an engine runs.
    """
    check_token = _token_check(settings.token_sha256)
    app = FastAPI(
        title="magihuman",
        version=version(),
        description="Short videos of a person speaking, from a prompt, an image and a voice.",
        docs_url=None,  # it would load its scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(Frame, settings=settings, metrics=metrics)
    _handle_errors(app)
    closed: dict[str, Any] = {"dependencies": [Depends(check_token)]}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page() -> HTMLResponse:
        text = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/health", response_model=Health, tags=["server"])
    async def health() -> Health:
        """Whether the server answers."""
        return Health(status="ok")

    @app.get("/ready", response_model=Health, responses={503: {"model": Health}}, tags=["server"])
    async def ready(response: Response) -> Health:
        """Whether an engine is loaded and new videos are taken."""
        if jobs().is_draining:
            response.status_code = 503
            return Health(status="draining")
        if not await is_ready():
            response.status_code = 503
            return Health(status="starting")
        return Health(status="ok")

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **_errors(401)},
        tags=["server"],
        **closed,
    )
    async def prometheus() -> Response:
        """For Prometheus."""
        return Response(metrics().text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.post(
        "/v1/videos",
        response_model=VideoObject,
        responses=_errors(400, 401, 403, 404, 408, 413, 415, 422, 429, 503),
        openapi_extra={"requestBody": body_schema(settings.limits)},
        tags=["videos"],
        **closed,
    )
    async def create(request: Request) -> VideoObject:
        """Ask for a video; it waits in line."""
        with _place(jobs()):
            new = await _read(request, settings)
        try:
            await jobs().add(new.job, new.fill)
        except OSError as error:
            raise ApiError(
                503,
                "disk",
                f"the server's disk does not take it: {error.strerror}",
                headers=retry(60),
            ) from error
        return VideoObject.of(new.job, settings.model)

    @app.get(
        "/v1/videos/{video_id}",
        response_model=VideoObject,
        responses=_errors(401, 404, 422),
        tags=["videos"],
        **closed,
    )
    async def retrieve(video_id: str) -> VideoObject:
        """A video's status and progress."""
        return VideoObject.of(_found(jobs(), video_id), settings.model)

    @app.get(
        "/v1/videos/{video_id}/content",
        response_class=FileResponse,
        responses={
            200: {"content": {"video/mp4": {}}, "description": "The mp4."},
            206: {
                "content": {"video/mp4": {}},
                "description": "A part of it, by the header Range.",
            },
            **_errors(401, 404, 409, 422),
        },
        tags=["videos"],
        **closed,
    )
    async def content(video_id: str) -> FileResponse:
        """The finished mp4, whole or in ranges."""
        job = _found(jobs(), video_id)
        if job.status is not Status.COMPLETED:
            raise ApiError(
                409,
                "not_completed",
                f"the video must be completed, and is {job.status.value}",
                "video_id",
            )
        path = jobs().video(job)
        if not path.exists():  # removed by hand
            raise _not_found()
        return FileResponse(
            path,
            media_type="video/mp4",
            filename=f"{job.id}.mp4",
            content_disposition_type="inline",
        )

    @app.delete(
        "/v1/videos/{video_id}",
        response_model=Deleted,
        responses=_errors(401, 403, 404, 422),
        tags=["videos"],
        **closed,
    )
    async def delete(video_id: str) -> Deleted:
        """Cancel a video that waits or is being made, or remove a finished one."""
        job = _found(jobs(), video_id)
        jobs().remove(job)
        return Deleted(id=job.id)

    return app


class Frame:
    """Around every request: the limit on its body, its origin, and a count of its answer."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Callable[[], Metrics]) -> None:
        self._app, self._metrics = app, metrics
        self._limit = settings.limits.body_bytes
        self._is_local = settings.is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        status = 500
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise too_large(self._limit)
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-content-type-options", b"nosniff"),
                    (b"cache-control", b"no-store"),
                ]
            await send(message)

        refusal = self._refusal(scope["method"], headers)
        try:
            if refusal is None:
                await self._app(scope, limited, noted)
            else:
                await refusal.response()(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics().count(scope["method"], route, status)

    def _refusal(self, method: str, headers: dict[bytes, bytes]) -> ApiError | None:
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self._limit:
            return too_large(self._limit)
        if method not in ("GET", "HEAD") and _is_foreign(headers):
            message = "requests from pages of other origins are refused"
            return ApiError(403, "forbidden_origin", message)
        if self._is_local and not _is_plain(headers.get(b"host", b"").decode("latin-1")):
            message = (
                "a server without a token must be called localhost or by its address, or, by a"
                " proxy, with such a Host; give it a token to call it by another name"
            )
            return ApiError(403, "forbidden_host", message)
        return None


def _is_plain(host: str) -> bool:
    """Whether it is localhost or an address, neither of which another page can be served under."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_foreign(headers: dict[bytes, bytes]) -> bool:
    """Whether a page from elsewhere has sent it: browsers send forms wherever a page says."""
    site = headers.get(b"sec-fetch-site")
    if site is not None:
        return site not in (b"same-origin", b"none")
    origin = headers.get(b"origin")
    return origin is not None and origin.partition(b"://")[2] != headers.get(b"host", b"")


def retry(seconds: int) -> dict[str, str]:
    """When to come again."""
    return {"Retry-After": str(seconds)}


def _token_check(expected: bytes | None) -> Callable[..., Awaitable[None]]:
    async def check(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)],
    ) -> None:
        if expected is None:
            return
        token = b"" if given is None else given.credentials.encode("utf-8", "surrogateescape")
        # Of hashes, so that not even the token's length shows in the time this takes.
        if not hmac.compare_digest(hashlib.sha256(token).digest(), expected):
            raise ApiError(
                401,
                "invalid_token",
                "this server's token must come as 'Authorization: Bearer TOKEN'",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


def _found(jobs: Jobs, video_id: str) -> Job:
    job = jobs.get(video_id)
    if job is None:
        raise _not_found()
    return job


def _not_found() -> ApiError:
    return ApiError(404, "video_not_found", "there is no such video, or no more", "video_id")


async def _read(request: Request, settings: Settings) -> uploads.NewVideo:
    try:
        async with asyncio.timeout(BODY_S):
            return await uploads.read(request, settings)
    except TimeoutError:
        message = f"the body must be sent within {BODY_S:g} s; send a smaller image or sound"
        raise ApiError(408, "body_too_slow", message) from None
    except ClientDisconnect:  # nobody is told, and it is no fault of the server
        raise ApiError(400, "malformed_body", "the body must be sent to its end") from None


@contextmanager
def _place(jobs: Jobs) -> Iterator[None]:
    try:
        with jobs.arriving():
            yield
    except LineFull:
        message = "as many videos wait as may; try again later"
        wait = retry(jobs.retry_after_s)
        raise ApiError(429, "queue_full", message, headers=wait) from None
    except Draining:
        raise ApiError(
            503,
            "draining",
            "the server is about to stop and takes no more; try again later",
            headers=retry(DRAIN_RETRY_S),
        ) from None


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def of_ours(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def of_starlette(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(sorted(_allowed(request)))
        return ApiError(error.status_code, code, str(error.detail), headers=headers).response()

    @app.exception_handler(RequestValidationError)
    async def of_fastapi(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return invalid(first["msg"], ".".join(map(str, first["loc"][1:]))).response()

    @app.exception_handler(Exception)
    async def of_nobody(request: Request, error: Exception) -> Response:
        return ApiError(
            500, "internal_error", "something went wrong in the server; its log has the details"
        ).response()


def _allowed(request: Request) -> set[str]:
    """The methods of all routes of a path; Starlette itself names those of the first alone."""
    return {
        method
        for route in request.app.routes
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
        for method in route.methods or ()
    }
