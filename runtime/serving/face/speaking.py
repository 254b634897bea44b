"""The engine's side of a face that speaks: its voice from a socket, and what is seen back to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from functools import partial

import numpy as np
import numpy.typing as npt

from magihuman import runtime
from magihuman.runtime.config import FPS, SAMPLE_RATE_HZ
from magihuman.runtime.media import Fragments
from magihuman.runtime.serving.messages import (
    Event,
    Failed,
    LiveWork,
    Made,
    Put,
    Report,
    Spoken,
    failure,
    told,
)

READY = Report("ready", 0, 0)  # the clock has started
PIECE_BYTES = 64 * 1024


def speak(engine: runtime.Engine, work: LiveWork) -> AsyncGenerator[Event, None]:
    """Have a face speak, and say how far it is. Closing this, or cancelling it, ends it.

    Raises:
        EngineLost: the engine has failed for good.
    """
    return told(partial(_made, engine, work))


async def _made(engine: runtime.Engine, work: LiveWork, put: Put) -> Made | Failed:
    try:
        await _speak(engine, work, put)
    except Exception as error:
        return failure(error, work.name)
    return Made({}, ())


async def _speak(engine: runtime.Engine, work: LiveWork, put: Put) -> None:
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
