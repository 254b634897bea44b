"""From the source of a voice into the voice, for as long as a session wants it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, Callable, Iterable
from concurrent.futures import Future
from functools import partial

from magihuman.runtime.engine.live.voice import LiveVoice
from magihuman.runtime.errors import InvalidRequestError
from magihuman.runtime.threads import spawn

LOOK_S = 0.02

Pump = Callable[[], Future[None] | None]


def pump_of(voice: LiveVoice, most_s: float, loop: asyncio.AbstractEventLoop | None) -> Pump:
    """What starts to feed a voice from its source, if it has one.

    most_s: that may be there ahead of what is used. loop: of an asynchronous source. Raises
    `InvalidRequestError` where that has none.
    """
    source = voice.source
    if source is None:
        return lambda: None
    if isinstance(source, Iterable):
        return lambda: spawn(partial(_pump, voice, source, most_s))
    if loop is None:
        raise InvalidRequestError("an asynchronous source needs an event loop: call alive()")
    return lambda: asyncio.run_coroutine_threadsafe(_apump(voice, source, most_s), loop)


def _pump(voice: LiveVoice, source: Iterable[object], most_s: float) -> None:
    blocks = iter(source)
    try:
        for block in blocks:
            while not voice.has_room(most_s):
                time.sleep(LOOK_S)
            if not voice.put(block):
                return
        voice.close()
    except BaseException as error:  # raised where chunks are taken
        voice.fail(error)
    finally:
        close = getattr(blocks, "close", None)
        if close is not None:
            close()


async def _apump(voice: LiveVoice, source: AsyncIterable[object], most_s: float) -> None:
    blocks = aiter(source)
    try:
        async for block in blocks:
            while not voice.has_room(most_s):
                await asyncio.sleep(LOOK_S)
            if not voice.put(block):
                return
        voice.close()
    except asyncio.CancelledError as error:
        voice.fail(error)
        raise
    except BaseException as error:
        voice.fail(error)
    finally:
        close = getattr(blocks, "aclose", None)
        if close is not None:
            await close()
