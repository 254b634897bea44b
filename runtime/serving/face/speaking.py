"""The engine's side of a face that speaks: its voice from a socket, and what is seen back to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

import numpy as np
import numpy.typing as npt

from magihuman import runtime
from magihuman.runtime.config import FPS, SAMPLE_RATE_HZ
from magihuman.runtime.media import Fragments
from magihuman.runtime.serving.messages import (
    EngineLost,
    Event,
    Failed,
    LiveWork,
    Made,
    Report,
    Spoken,
)

log = logging.getLogger("magihuman")

READY = Report("ready", 0, 0)  # the clock has started
PIECE_BYTES = 64 * 1024


async def speak(engine: runtime.Engine, work: LiveWork) -> AsyncGenerator[Event, None]:
    """Have a face speak, and say how far it is. Closing this, or cancelling it, ends it.

    Raises:
        EngineLost: the engine has failed for good.
    """
    events: asyncio.Queue[Event | None] = asyncio.Queue()
    speaking = asyncio.create_task(_speak(engine, work, events.put_nowait))
    speaking.add_done_callback(lambda _: events.put_nowait(None))
    try:
        while (event := await events.get()) is not None:
            yield event
        yield _outcome(speaking, work.name)
    finally:
        if not speaking.done():
            speaking.cancel()
            await asyncio.wait([speaking])


async def _speak(engine: runtime.Engine, work: LiveWork, put: Callable[[Event], None]) -> None:
    loop = asyncio.get_running_loop()

    def tell() -> None:
        loop.call_soon_threadsafe(put, READY)

    reader, writer = await asyncio.open_unix_connection(work.socket)
    fragments = Fragments(FPS, SAMPLE_RATE_HZ)
    try:
        voice = runtime.LiveVoice(work.rate_hz, samples(reader))
        async with engine.alive(
            work.image, voice, work.prompt, on_ready=tell, **work.options
        ) as chunks:
            async for chunk in chunks:
                window = chunk.frames, chunk.audio, chunk.is_last
                writer.write(await asyncio.to_thread(fragments.add, *window))
                await writer.drain()
                put(_spoken(chunk))
    finally:
        writer.close()
        await asyncio.to_thread(fragments.close)


async def samples(reader: asyncio.StreamReader) -> AsyncGenerator[npt.NDArray[np.int16], None]:
    """Yield what comes of a voice, 16 bits a sample, the lower ones first."""
    rest = b""
    while piece := await reader.read(PIECE_BYTES):
        whole = rest + piece
        rest = whole[len(whole) // 2 * 2 :]
        yield np.frombuffer(whole[: len(whole) // 2 * 2], "<i2").astype(np.int16)


def _spoken(chunk: runtime.LiveChunk) -> Spoken:
    return Spoken(
        chunk.index,
        chunk.start_s,
        len(chunk.frames),
        chunk.window_s,
        chunk.delay_s,
        chunk.late,
        chunk.repeated,
    )


def _outcome(speaking: asyncio.Task[None], name: str) -> Made | Failed:
    try:
        speaking.result()
    except runtime.EngineUnusable as error:
        raise EngineLost(str(error)) from error
    except runtime.MagiHumanError as error:
        return Failed(code_of(error), str(error))
    except Exception:
        log.exception("%s has failed", name)
        message = "something went wrong in the engine; the server's log has the details"
        return Failed("internal_error", message)
    return Made({}, ())


def code_of(error: runtime.MagiHumanError) -> str:
    """Return the code that clients are told of an error."""
    match error:
        case runtime.InvalidRequestError():
            return "invalid_request"
        case runtime.DeadlineExceeded():
            return "deadline_exceeded"
        case runtime.DeviceError():
            return "device"
        case runtime.OutputError():
            return "disk"
        case runtime.NonFiniteError():
            return "model"
    return "engine"
