"""Work whose files lie in a storage, done on an engine's own disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from magihuman.runtime.serving.messages import Event, Failed, LiveWork, Made, Make, Stays, Work
from magihuman.runtime.serving.record import AUDIO, IMAGE, VIDEO
from magihuman.runtime.serving.storage.files import Storage, StorageError

log = logging.getLogger("magihuman")

TRIES, PAUSE_S = 4, 1.0  # of a storage that is away for a moment; twice as long after each


async def staged(work: Work | LiveWork, make: Make) -> AsyncGenerator[Event, None]:
    """Make a video by `make`, with the files of `Work.stays` where the work has any."""
    if isinstance(work, LiveWork) or work.stays is None:
        async with aclosing(make(work)) as events:
            async for event in events:
                yield event
        return
    with TemporaryDirectory(prefix="magihuman-") as folder:
        try:
            storage = Storage(work.stays.url)
            own = await asyncio.to_thread(_fetched, storage, work, Path(folder, work.stays.folder))
        except OSError as error:
            yield _refused(work.stays, error)
            return
        async with aclosing(make(own)) as events:
            async for event in events:
                if isinstance(event, Made):
                    yield await _kept(storage, own, event)
                else:
                    yield event


async def _kept(storage: Storage, work: Work, made: Made) -> Made | Failed:
    """Put what was made where it is to stay."""
    assert work.stays is not None
    for attempt in range(TRIES):
        try:
            await asyncio.to_thread(storage.put, work.save, work.stays.video)
            return made
        except StorageError as error:
            if attempt == TRIES - 1:
                return _refused(work.stays, error)
            log.warning("%s: its storage is tried again: %s", work.stays.folder, error.strerror)
            await asyncio.sleep(PAUSE_S * 2**attempt)
    raise AssertionError


def _fetched(storage: Storage, work: Work, folder: Path) -> Work:
    """Copy the uploads to a folder, and return the work with them there."""
    assert work.stays is not None
    folder.mkdir()
    files = {}
    for name in storage.names(work.stays.folder) & {IMAGE, AUDIO}:
        files[name] = folder / name
        storage.get(f"{work.stays.folder}/{name}", files[name])
    request = replace(work.request, image=files.get(IMAGE), audio=files.get(AUDIO))
    return replace(work, request=request, save=folder / VIDEO)


def _refused(stays: Stays, error: OSError) -> Failed:
    log.warning("%s: its storage cannot be used: %s", stays.folder, error)
    return Failed("storage", "the storage of the server's videos cannot be used; try again later")
