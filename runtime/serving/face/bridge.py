"""Between the process that speaks HTTP and that of an engine: a socket of the file system."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self


class Bridge:
    """A Unix socket in a folder that its user alone can open, for one engine to connect to.

    Attributes:
        folder: of the socket, with room for other files.
        reader, writer: once `connected` has returned.
    """

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="magihuman-"))  # short, as a socket's name must
        self._connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._server: asyncio.Server | None = None

    @property
    def path(self) -> Path:
        """Where the engine connects to."""
        return self.folder / "socket"

    async def __aenter__(self) -> Self:
        try:
            self._server = await asyncio.start_unix_server(self._accept, self.path)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        if self._connected.done() and not self._connected.cancelled():
            self.writer.close()
        self._connected.cancel()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def connected(self) -> None:
        """Return once the engine is there."""
        await asyncio.shield(self._connected)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._connected.done():
            writer.close()
            return
        self.reader, self.writer = reader, writer
        self._connected.set_result(None)
