"""One client that has asked for a WebSocket: uvicorn's, as one of the crowd."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.websockets.wsproto_impl import WSProtocol

from magihuman.runtime.serving.front.crowd import Crowd


class Channel(WSProtocol):
    """A WebSocket, which counts as a connection that is in use. Its application bounds it."""

    def __init__(self, *options: Any, crowd: Crowd, **named: Any) -> None:
        """crowd: of the same server. Others: those that uvicorn gives."""
        super().__init__(*options, **named)
        self._crowd = crowd

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Be one of the crowd, in place of the connection that it was."""
        super().connection_made(transport)
        if self._crowd.join(self):
            self._crowd.busy(self)
        else:
            self.drop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave the crowd."""
        self._crowd.leave(self)
        super().connection_lost(exc)

    def drop(self) -> None:
        """Close at once, whatever is left unsent."""
        self.transport.abort()
