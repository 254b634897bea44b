"""One client: uvicorn's connection, which is given no head of a request that is out of bounds."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from magihuman.runtime.serving.errors import ApiError
from magihuman.runtime.serving.front.bounds import Bounds
from magihuman.runtime.serving.front.crowd import Crowd

HEAD_END = re.compile(rb"\n\r?\n")  # as h11 has it
FIRST_LETTER = 0x21  # what begins with less is no request, but TLS for instance
ALWAYS = [(b"connection", b"close"), (b"x-content-type-options", b"nosniff")]


class Connection(H11Protocol):
    """HTTP/1.1 of one client.

    The head of a request is gathered here and handed on whole, so that neither its bytes nor its
    lines cost more than `Bounds` says. A request that is sent before the one before has been
    answered is not served: the connection closes, and the client sends it again.
    """

    def __init__(self, *, crowd: Crowd, bounds: Bounds, **options: Any) -> None:
        """crowd: of the same server. options: those that uvicorn gives."""
        super().__init__(**options)
        self._crowd, self._bounds = crowd, bounds
        self._head = bytearray()
        self._is_refused = False
        self._waiting: asyncio.TimerHandle | None = None  # for a head, or the end of lingering
        self._writing: asyncio.TimerHandle | None = None  # for the client to take something

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request, as one of the crowd."""
        super().connection_made(cast("asyncio.Transport", transport))
        if not self._crowd.join(self):
            self._refuse(ApiError(503, "too_many_connections", "too many clients; try again later"))
            self.transport.close()
            return
        self._wait(self._bounds.head_s, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Give up all that is kept for the client."""
        self._crowd.leave(self)
        self._stop_waiting()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Gather a head, and hand on what follows it."""
        if self._is_refused:
            return
        if self.conn.their_state is not h11.IDLE:
            super().data_received(data)
            return
        end = self._gather(data)
        if end is None:
            return
        if self._head.count(b"\n", 0, end) > self._bounds.head_lines + 2:
            self._refuse_head()
            return
        head, self._head = bytes(self._head), bytearray()
        super().data_received(head)

    def handle_events(self) -> None:
        """Take what has been received further; with a request, it waits no more."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and not self._is_refused:
            self._stop_waiting()
            self._crowd.busy(self)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Be a connection no more: what comes is for a `Channel`."""
        self._stop_waiting()
        self._crowd.leave(self)
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        """Wait for the next request, and for the rest of this one's body."""
        self._crowd.idle(self)
        if (
            self.conn.their_state is h11.DONE and self.conn.trailing_data[0]
        ):  # the next request, which no bounds have seen
            self._linger()
            return
        super().on_response_complete()
        self._unset_keepalive_if_required()
        if not self.transport.is_closing():
            self._wait(self._bounds.head_s, self._too_slow)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, in the one form that clients are told of."""
        self._refuse(ApiError(400, "malformed_request", "the request must be HTTP/1.1"))

    def shutdown(self) -> None:
        """Close now, or after the answer that is being sent."""
        if self._is_refused:
            self.drop()
        else:
            super().shutdown()

    def pause_writing(self) -> None:
        """Wait for the client to take something."""
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(self._bounds.idle_s, self.drop)

    def resume_writing(self) -> None:
        """Go on; the client has taken something."""
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        if self.flow is not None:
            super().resume_writing()

    def drop(self) -> None:
        """Close at once, whatever is left unsent."""
        self.transport.abort()

    def _gather(self, data: bytes) -> int | None:
        """Add to the head, and return where it ends, or None where it does not yet."""
        known = max(0, len(self._head) - 2)
        self._head += data
        if self._head[0] < FIRST_LETTER:
            return len(self._head)
        found = HEAD_END.search(self._head, known, self._bounds.head_bytes)
        if found is None and len(self._head) >= self._bounds.head_bytes:
            self._refuse_head()
        return None if found is None else found.end()

    def _refuse_head(self) -> None:
        limit, lines = self._bounds.head_bytes, self._bounds.head_lines
        message = (
            f"a request must have no more than {lines} headers, and {limit} bytes before its body"
        )
        self._refuse(ApiError(431, "headers_too_large", message))

    def _refuse(self, error: ApiError) -> None:
        """Answer, and read no more. Where an answer has begun it is cut off."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.drop()
            return
        if self.cycle is not None:  # the application is told that the client has gone
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        answer = error.response()
        head = h11.Response(
            status_code=answer.status_code,
            headers=[*answer.raw_headers, *ALWAYS],
        )
        for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self._linger()

    def _linger(self) -> None:
        """Send no more, and close once the client does or some time has passed.

        At once would not do: what it still sends would have its system throw the answer away.
        """
        self._is_refused, self._head = True, bytearray()
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        self.transport.write_eof()
        self._wait(self._bounds.linger_s, self.drop)

    def _too_slow(self) -> None:
        if self._head:
            message = f"a request must have sent its headers within {self._bounds.head_s:g} s"
            self._refuse(ApiError(408, "headers_too_slow", message))
        else:
            self.transport.close()

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop_waiting()
        self._waiting = self.loop.call_later(seconds, then)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
