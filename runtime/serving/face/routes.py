"""Where a face is talked to: the WebSocket `/v1/live`."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from fastapi import FastAPI
from starlette.websockets import WebSocket, WebSocketDisconnect

from magihuman.runtime.serving.errors import ApiError, malformed
from magihuman.runtime.serving.face.bridge import Bridge
from magihuman.runtime.serving.face.opening import Opening, opening_of
from magihuman.runtime.serving.face.talk import SENDING_S, Gone, Talk
from magihuman.runtime.serving.jobs import Draining, EnginesBusy, Jobs
from magihuman.runtime.serving.messages import EngineLost, LiveWork
from magihuman.runtime.serving.settings import Settings

log = logging.getLogger("magihuman")

OPENING_S = 20.0  # for the first message
MOST_OPENING = 16  # whose first message is awaited, or read
DONE, LEAVING, REFUSED, BROKEN, LATER = 1000, 1001, 1008, 1011, 1013  # of RFC 6455


@dataclass
class FaceRoutes:
    """A face that is talked to.

    Attributes:
        jobs: asked at each talk, since the application can be made before them.
    """

    settings: Settings
    jobs: Callable[[], Jobs]
    _opening: int = field(default=0, init=False)

    def add_to(self, app: FastAPI) -> None:
        """Bind the route. Its token comes with the first message, or in a header."""
        app.add_api_websocket_route("/v1/live", self.live)

    async def live(self, client: WebSocket) -> None:
        """Have a talk from its first message to its end, and say how it ends."""
        await client.accept()
        code, last = DONE, dict[str, object](type="end")
        try:
            await self._talk(client)
        except (Gone, WebSocketDisconnect):
            return
        except ApiError as error:
            code = _close_code(error)
            last = {"type": "error", **json.loads(bytes(error.response().body))}
        except OSError as error:  # a client that takes nothing, too
            log.warning("a talk has ended: %r", error)
            code = BROKEN
        # It may be gone by now, and what it sends meanwhile is nobody's.
        with suppress(WebSocketDisconnect, TimeoutError, RuntimeError):
            async with asyncio.timeout(SENDING_S):
                await client.send_text(json.dumps(last))
                await client.close(code)

    async def _talk(self, client: WebSocket) -> None:
        jobs = self.jobs()
        opening = await self._open(client)
        if not jobs.has_live:
            message = "servers that share their videos talk to nobody; ask one that shares none"
            raise ApiError(503, "not_live", message)
        try:
            async with jobs.alone() as make, Bridge() as bridge:
                image = await asyncio.to_thread(opening.write_image, bridge.folder, self.settings)
                work = LiveWork(
                    f"talk_{secrets.token_hex(8)}",
                    image,
                    opening.prompt,
                    opening.rate_hz,
                    bridge.path,
                    opening.options,
                )
                await _until(jobs.leaving(), Talk(client, bridge).run(make, work))
        except EnginesBusy:
            message = "every engine makes a video, or talks to somebody; try again later"
            raise ApiError(503, "busy", message) from None
        except Draining:
            raise _draining() from None
        except EngineLost as error:
            log.warning("a talk has lost its engine: %s", str(error).partition("\n")[0])
            raise ApiError(500, "engine", "the engine has failed; try again later") from None

    async def _open(self, client: WebSocket) -> Opening:
        """Read the first message. Raises `ApiError`."""
        if self._opening >= MOST_OPENING:
            raise ApiError(503, "busy", "too many begin to talk at once; try again later")
        self._opening += 1
        try:
            async with asyncio.timeout(OPENING_S):
                message = await client.receive()
            if message["type"] == "websocket.disconnect":
                raise Gone
            if message.get("text") is None:
                raise malformed("the first message must be text, a JSON object")
            given = client.headers.get("authorization", "")
            return await asyncio.to_thread(opening_of, message["text"], given, self.settings)
        except TimeoutError:
            sentence = f"the first message must come within {OPENING_S:g} s"
            raise ApiError(408, "too_slow", sentence) from None
        finally:
            self._opening -= 1


async def _until(leaving: Awaitable[None], talk: Awaitable[None]) -> None:
    """A talk to its end, or until the server stops. Raises `ApiError` for that."""
    ending, talking = asyncio.ensure_future(leaving), asyncio.ensure_future(talk)
    try:
        await asyncio.wait({ending, talking}, return_when=asyncio.FIRST_COMPLETED)
        if not talking.done():
            raise _draining()
        talking.result()
    finally:
        for task in (ending, talking):
            task.cancel()
        await asyncio.gather(ending, talking, return_exceptions=True)


def _draining() -> ApiError:
    return ApiError(503, "draining", "the server is about to stop; try again later")


def _close_code(error: ApiError) -> int:
    if error.code == "draining":
        return LEAVING
    if error.status == 503:
        return LATER
    return BROKEN if error.status >= 500 else REFUSED
