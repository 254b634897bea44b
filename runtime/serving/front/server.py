"""A server of one ASGI application, in the event loop that starts it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from magihuman.runtime.serving.front.bounds import Bounds, room_for
from magihuman.runtime.serving.front.channel import Channel
from magihuman.runtime.serving.front.connection import Connection
from magihuman.runtime.serving.front.crowd import Crowd

ENDING_S = 5  # for answers that are being sent when the server stops
BACKLOG = 1024


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class Front:
    """Listens, and answers by the application, within bounds."""

    def __init__(self, app: ASGIApp, bounds: Bounds | None = None) -> None:
        """bounds: by default, those of `Bounds`."""
        bounds = bounds or Bounds()
        self._crowd = Crowd(room_for(bounds.connections))
        # What clients do wrong is no warning.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        self._server = _Uvicorn(
            uvicorn.Config(
                cast("Any", app),
                http=cast("Any", partial(Connection, crowd=self._crowd, bounds=bounds)),
                ws=cast("Any", partial(Channel, crowd=self._crowd)),
                ws_max_size=bounds.message_bytes,
                ws_per_message_deflate=False,
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                h11_max_incomplete_event_size=bounds.head_bytes,
                timeout_graceful_shutdown=ENDING_S,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen at all addresses of a host, and return the port, which 0 lets the system choose.

        Raises `OSError` where one cannot be had.
        """
        sockets = listeners(host, port)
        self._serving = asyncio.create_task(self._server.serve(sockets))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.01)
        if self._serving.done():
            await self._serving
        return cast("int", sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Take no more connections, and return once those there are have ended."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving


def listeners(host: str, port: int) -> list[socket.socket]:
    """Bind a socket to each address of a host. Raises `OSError`."""
    places = {info[4]: info for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    with contextlib.ExitStack() as stack:
        sockets = []
        for family, kind, _, _, place in places.values():
            each = stack.enter_context(socket.socket(family, kind))
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            each.bind(place)
            sockets.append(each)
        stack.pop_all()  # the server closes them
    return sockets
