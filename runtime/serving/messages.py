"""What passes between the part that speaks HTTP and an engine, which can be another process."""

from __future__ import annotations

import asyncio
import logging
import platform
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magihuman.runtime.errors import (
    DeadlineExceeded,
    DeviceError,
    EngineUnusable,
    InvalidRequestError,
    MagiHumanError,
    NonFiniteError,
    OutputError,
)
from magihuman.runtime.request import Request

if TYPE_CHECKING:
    from prometheus_client.core import Metric

log = logging.getLogger("magihuman")


@dataclass(frozen=True)
class Stays:
    """Where the files of a video lie that another machine is to find.

    Attributes:
        url: of the storage.
        folder: of the video, in it; has the uploads.
        video: the name of the mp4, in the storage too.
    """

    url: str
    folder: str
    video: str


@dataclass(frozen=True)
class Work:
    """One video to make.

    Attributes:
        save: the mp4 to write, whole or not at all.
        live: a file to write windows to while the clip is made, as fragmented mp4; None for none.
        deadline_s: from when the engine has it.
        stays: where the uploads come from and the mp4 goes; the request then has no files, and
            `save` is on the engine's own disk. None where all of it is on one machine.
    """

    request: Request
    save: Path
    deadline_s: float | None
    live: Path | None = None
    stays: Stays | None = None

    @property
    def name(self) -> str:
        """Of the video."""
        return self.save.parent.name


@dataclass(frozen=True)
class LiveWork:
    """A face that speaks while its voice is still coming.

    Attributes:
        name: of the session.
        image, prompt, options: of `Engine.live`.
        rate_hz: of the voice.
        socket: a Unix socket to connect to. The voice comes from there, mono and 16 bits, and
            fragmented mp4 goes back.
    """

    name: str
    image: Path
    prompt: str
    rate_hz: int
    socket: Path
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spoken:
    """A window of a face has gone to its socket; the fields are those of a `LiveChunk`."""

    index: int
    start_s: float
    frames: int
    window_s: float
    delay_s: float
    late: bool
    repeated: int


@dataclass(frozen=True)
class Report:
    """Steps finished of how many; the first says that an engine has begun."""

    stage: str
    step: int
    of: int


@dataclass(frozen=True)
class Window:
    """Some more frames are decoded.

    Attributes:
        frames: of the clip that are decoded now.
        live_bytes: of `Work.live` that can be read now; 0 where it is not written.
    """

    frames: int
    live_bytes: int


@dataclass(frozen=True)
class Made:
    """The file is there.

    Attributes:
        peak_memory_mb: that the engine has held meanwhile, MB of 10^6 bytes, where it is known.
    """

    timings_s: dict[str, float]
    warnings: tuple[str, ...]
    peak_memory_mb: float | None = None


@dataclass(frozen=True)
class Failed:
    """There will be no file, and another try would not help."""

    code: str
    message: str


@dataclass(frozen=True)
class Figures:
    """What an engine has counted since it was loaded.

    Attributes:
        engine: a name that no other engine has or had.
        process: its number.
        node: the name of its machine.
        order: higher in later ones of this engine.
        families: the figures, as a registry collects them.
        room_bytes: what its memory plan leaves each stage to work in; none on a CPU.
    """

    engine: str
    process: int
    order: int
    families: list[Metric]
    room_bytes: Mapping[str, int] = field(default_factory=dict)
    node: str = field(default_factory=platform.node)


class EngineLost(Exception):  # noqa: N818 - a state, not a fault of this request
    """The engine has gone, with what it was making; another can make it again."""


Event = Report | Window | Spoken | Made | Failed
Make = Callable[[Work | LiveWork], AsyncGenerator[Event, None]]  # may raise EngineLost
Put = Callable[[Event], None]


async def told(make: Callable[[Put], Coroutine[Any, Any, Event]]) -> AsyncGenerator[Event, None]:
    """Yield what a task puts, and then its result. Closing this, or cancelling it, cancels it."""
    events: asyncio.Queue[Event | None] = asyncio.Queue()
    making = asyncio.create_task(make(events.put_nowait))
    making.add_done_callback(lambda _: events.put_nowait(None))
    try:
        while (event := await events.get()) is not None:
            yield event
        yield making.result()
    finally:
        if not making.done():
            making.cancel()
            await asyncio.wait([making])


def failure(error: Exception, name: str) -> Failed:
    """Return what the server is told of an engine's error; name: of what was being made.

    Raises `EngineLost` for that of an engine that has failed for good.
    """
    if isinstance(error, EngineUnusable):
        raise EngineLost(str(error)) from error
    if isinstance(error, MagiHumanError):
        return Failed(_code_of(error), str(error))
    log.error("%s has failed", name, exc_info=error)
    message = "something went wrong in the engine; the server's log has the details"
    return Failed("internal_error", message)


def _code_of(error: MagiHumanError) -> str:
    match error:
        case InvalidRequestError():
            return "invalid_request"
        case DeadlineExceeded():
            return "deadline_exceeded"
        case DeviceError():
            return "device"
        case OutputError():
            return "disk"
        case NonFiniteError():
            return "model"
    return "engine"
