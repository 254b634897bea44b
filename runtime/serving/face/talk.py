"""One talk: a client's voice to an engine, and what is seen and heard back to the client."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass
from typing import Any

from starlette.websockets import WebSocket

from magihuman.runtime.serving.errors import ApiError, invalid, malformed
from magihuman.runtime.serving.face.bridge import Bridge
from magihuman.runtime.serving.live.stream import MEDIA_TYPE, media_type
from magihuman.runtime.serving.messages import Failed, LiveWork, Make, Report, Spoken

MOST_S = 1800.0  # of a talk, after which its voice ends
SILENT_S = 60.0  # without a message, after which it ends
SENDING_S = 30.0  # for a client to take a piece
VOICE_BYTES = 256 * 1024  # of a message with a piece of the voice
PIECE_BYTES = 64 * 1024
STARTING_S = 120.0  # for an engine to connect
END = {"type": "end"}


class Gone(Exception):  # noqa: N818 - a state
    """The client has left."""


@dataclass
class Talk:
    """A WebSocket that is accepted, and the socket that an engine connects to.

    Attributes:
        head: bytes of the stream that are not sent yet, as long as its codecs are not known.
    """

    client: WebSocket
    bridge: Bridge
    head: bytes = b""

    async def run(self, make: Make, work: LiveWork) -> None:
        """Return once all that is seen of the voice has been sent.

        Raises `ApiError` where it ends otherwise, `Gone`, or `EngineLost`.
        """
        parts = self._follow(make, work), self._send(), self._listen()
        following, sending, listening = map(asyncio.create_task, parts)
        connected = asyncio.create_task(self.bridge.connected())
        made: asyncio.Future[Any] = asyncio.gather(following, sending)
        ends: set[asyncio.Future[Any]] = {made, listening}
        try:
            async with asyncio.timeout(STARTING_S):
                await asyncio.wait({following, connected}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if made.done():
                made.result()
            else:
                listening.result()  # which ends by an error alone
        except TimeoutError:
            raise ApiError(503, "engine", "no engine has taken the talk; try again") from None
        finally:
            tasks = made, following, sending, listening, connected
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, make: Make, work: LiveWork) -> None:
        """Tell what the engine tells, until it has made all."""
        async with aclosing(make(work)) as events:
            async for event in events:
                match event:
                    case Report("ready"):
                        await self.tell({"type": "ready"})
                    case Spoken():
                        await self.tell({"type": "window", **asdict(event)})
                    case Failed(code, message):
                        raise _failure(code, message)

    async def _listen(self) -> None:
        """Hand the voice on, until the client leaves or does what it may not."""
        await self.bridge.connected()
        loop = asyncio.get_running_loop()
        end_s, has_ended = loop.time() + MOST_S, False
        while True:
            left_s = max(0.0, end_s - loop.time())
            try:
                piece = await asyncio.wait_for(
                    self._heard(), None if has_ended else min(SILENT_S, left_s)
                )
            except TimeoutError:
                piece = b""
            if has_ended:
                continue
            if not piece:
                has_ended = True
                with suppress(OSError):
                    self.bridge.writer.write_eof()
                continue
            with suppress(OSError):  # an engine that has ended says so itself
                self.bridge.writer.write(piece)
                await self.bridge.writer.drain()

    async def _heard(self) -> bytes:
        """The next piece of the voice; none where it ends."""
        message = await self.client.receive()
        if message["type"] == "websocket.disconnect":
            raise Gone
        if (text := message.get("text")) is not None:
            if _is_end(text):
                return b""
            raise malformed('a text after the first message must be {"type": "end"}')
        piece: bytes = message["bytes"]
        if len(piece) > VOICE_BYTES:
            limit = f"a piece of the voice must have no more than {VOICE_BYTES} bytes"
            raise ApiError(413, "body_too_large", f"{limit}, got {len(piece)}")
        if not piece or len(piece) % 2:
            raise invalid("a piece of the voice must be samples of 16 bits, and at least one")
        return piece

    async def _send(self) -> None:
        """Send what comes of the engine, its codecs before it."""
        await self.bridge.connected()
        is_begun = False
        while piece := await self.bridge.reader.read(PIECE_BYTES):
            if not is_begun:
                self.head += piece
                kind = media_type(self.head)
                if kind == MEDIA_TYPE:  # they are not among what has come
                    continue
                await self.tell({"type": "stream", "media_type": kind})
                piece, self.head, is_begun = self.head, b"", True
            async with asyncio.timeout(SENDING_S):
                await self.client.send_bytes(piece)

    async def tell(self, message: dict[str, Any]) -> None:
        """Send a message of text."""
        async with asyncio.timeout(SENDING_S):
            await self.client.send_text(json.dumps(message))


def _is_end(text: str) -> bool:
    try:
        return bool(json.loads(text) == END)
    except (ValueError, RecursionError):
        return False


def _failure(code: str, message: str) -> ApiError:
    """The error that a client is told of an engine's."""
    is_its_own = code == "invalid_request"
    return ApiError(422 if is_its_own else 500, code, message)
