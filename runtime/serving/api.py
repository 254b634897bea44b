"""The HTTP side as one application: routes, limits, token, errors. Knows jobs, and no engine."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from magihuman.runtime.files import version
from magihuman.runtime.serving.asked.rules import refusal
from magihuman.runtime.serving.errors import ApiError, too_large
from magihuman.runtime.serving.face.routes import FaceRoutes
from magihuman.runtime.serving.jobs import Jobs
from magihuman.runtime.serving.live.routes import LiveRoutes
from magihuman.runtime.serving.metrics import Metrics
from magihuman.runtime.serving.page.routes import PageRoutes
from magihuman.runtime.serving.routes import ServerRoutes, VideoRoutes
from magihuman.runtime.serving.schema import ErrorBody
from magihuman.runtime.serving.settings import Settings
from magihuman.runtime.serving.transfer.spool import Budget
from magihuman.runtime.serving.views.listing import MAX_PAGE, ListRoutes
from magihuman.runtime.serving.views.models import ModelRoutes
from magihuman.runtime.serving.views.sync import SyncRoute

# A header Host, whole: what follows an address could make a name of it.
HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9.]+))(?::[0-9]{1,5})?")
# What is after the question mark of an address, and what to do where it is something else.
QUERY_RULES = {
    "limit": (f"a whole number from 1 to {MAX_PAGE}", "ask for the rest by after"),
    "order": ("asc or desc", "leave it out for the newest first"),
    "after": ("the id of a video", "leave it out for the first page"),
    "variant": ("video, thumbnail or spritesheet", "leave it out for the mp4"),
}
BEARER = HTTPBearer(auto_error=False, description="The server's token, where it has one.")


def create_app(
    settings: Settings,
    jobs: Callable[[], Jobs],
    is_ready: Callable[[], Awaitable[bool]],
    metrics: Callable[[], Metrics],
) -> FastAPI:
    """Make the ASGI application.

    jobs, metrics: asked at each request, since the application can be made before them. is_ready:
    whether an engine runs.
    """
    app = FastAPI(
        title="magihuman",
        version=version(),
        description="Short videos of a person speaking, from a prompt, an image and a voice.",
        docs_url=None,  # it would load its scripts from elsewhere
        redoc_url=None,
        responses={431: {"model": ErrorBody, "description": "Its headers are too large."}},
        redirect_slashes=False,  # a redirect would lead wherever the header Host says
    )
    app.add_middleware(LimitsMiddleware, settings=settings, metrics=metrics)
    _handle_errors(app)
    check = _token_check(settings.token_sha256)
    PageRoutes(settings).add_to(app)
    ServerRoutes(jobs, is_ready, metrics).add_to(app, check)
    budget = Budget(settings.limits.bodies * settings.limits.body_bytes)
    videos = VideoRoutes(settings, jobs, budget)
    videos.add_to(app, check)
    ListRoutes(settings, jobs).add_to(app, check)
    ModelRoutes(settings).add_to(app, check)
    SyncRoute(videos).add_to(app, check)
    LiveRoutes(jobs).add_to(app, check)
    FaceRoutes(settings, jobs).add_to(app)
    return app


class LimitsMiddleware:
    """Bounds the body of a request, refuses foreign origins and hosts, and counts the answer.

    Answers are given headers that forbid browsers to guess their type or to keep them.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Callable[[], Metrics]) -> None:
        self._app, self._metrics = app, metrics
        self._limit = settings.limits.body_bytes
        self._is_local = settings.is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI has it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["type"] == "websocket":
            if self._refusal("CONNECT", headers) is None:
                await self._app(scope, receive, send)
            else:  # with the status 403, before it is one
                await send({"type": "websocket.close"})
            return
        status = 500
        received = 0

        async def limited() -> Message:
            nonlocal received
            try:
                message = await receive()
            except Exception:  # Ray's, of a client that has gone
                message = {"type": "http.disconnect"}
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
    found = HOST.fullmatch(host)
    if found is None:
        return False
    name = found["v6"] or found["name"]
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).version == (6 if found["v6"] else 4)
    except ValueError:
        return False


def _is_foreign(headers: dict[bytes, bytes]) -> bool:
    """Whether a page from elsewhere has sent it: browsers send forms wherever a page says."""
    site = headers.get(b"sec-fetch-site")
    if site is not None:
        return site not in (b"same-origin", b"none")
    origin = headers.get(b"origin")
    return origin is not None and origin.partition(b"://")[2] != headers.get(b"host", b"")


def _token_check(expected: bytes | None) -> Callable[..., Awaitable[None]]:
    """Make a dependency that refuses requests without the token, whose SHA-256 is expected."""

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


def _handle_errors(app: FastAPI) -> None:
    """Answer every error in the one form that clients are told of."""

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
        name = ".".join(map(str, first["loc"][1:]))
        rule, remedy = QUERY_RULES.get(
            name, (f"as described ({first['msg']})", "see /openapi.json")
        )
        return refusal(name, rule, first.get("input"), remedy).response()

    @app.exception_handler(Exception)
    async def of_nobody(request: Request, error: Exception) -> Response:
        return ApiError(
            500, "internal_error", "something went wrong in the server; its log has the details"
        ).response()


def _allowed(request: Request) -> set[str]:
    """Return the methods of all routes of a path; Starlette names those of the first alone.

    A path that is one's own, as `/v1/videos/sync`, is no id of a video.
    """
    matching = [
        route
        for route in request.app.routes
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
    ]
    own = [route for route in matching if route.path == request.scope["path"]]
    return {method for route in own or matching for method in route.methods or ()}
