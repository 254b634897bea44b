"""An engine that takes work one message after the other. Knows nothing of HTTP, nor of Ray."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import secrets
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from magihuman import runtime
from magihuman.runtime.files import sync
from magihuman.runtime.serving.messages import (
    EngineLost,
    Event,
    Failed,
    Figures,
    Made,
    Report,
    Work,
)

log = logging.getLogger("magihuman")


class EngineReplica:
    """Loads an engine and makes videos with it.

    Attributes:
        registry: has the engine's figures.
    """

    def __init__(
        self,
        options: dict[str, Any],
        warmup: Sequence[tuple[int, int, float]],
    ) -> None:
        """options: of `runtime.load`. warmup: sizes as for `Engine.warmup`."""
        self.registry = CollectorRegistry()
        self._name, self._order = secrets.token_hex(8), itertools.count()
        hooks = [runtime.PrometheusHooks(self.registry)]
        self._engine = runtime.load(**options, hooks=hooks)
        if warmup:
            self._engine.warmup(warmup)

    def check_health(self) -> None:
        """Raise where the engine can make no more videos."""
        if not self._engine.is_usable:
            raise RuntimeError("the engine can make no more videos; start another process")

    async def make(self, work: Work) -> AsyncGenerator[Event, None]:
        """Make one video and say how far it is. Closing this, or cancelling it, gives it up.

        Raises:
            EngineLost: the engine has failed for good.
        """
        yield Report("prepare", 0, 0)
        loop = asyncio.get_running_loop()
        reports: asyncio.Queue[runtime.Progress | None] = asyncio.Queue()

        def tell(progress: runtime.Progress) -> None:
            loop.call_soon_threadsafe(reports.put_nowait, progress)

        making = asyncio.create_task(
            self._engine.agenerate(
                work.request, save=work.save, on_progress=tell, deadline_s=work.deadline_s
            )
        )
        making.add_done_callback(lambda _: reports.put_nowait(None))
        try:
            while (progress := await reports.get()) is not None:
                yield Report(progress.stage, progress.step, progress.of)
            yield await _outcome(making, work.save)
        finally:
            if not making.done():
                making.cancel()
                await asyncio.wait([making])

    def figures(self) -> Figures:
        """Return what the engine has counted up to now."""
        order = next(self._order)
        return Figures(self._name, os.getpid(), order, list(self.registry.collect()))

    def close(self) -> None:
        """Free the memory."""
        self._engine.close()


async def _outcome(making: asyncio.Task[runtime.Video], path: Path) -> Made | Failed:
    try:
        video = making.result()
        await asyncio.to_thread(sync, path)
    except runtime.EngineUnusable as error:
        raise EngineLost(str(error)) from error
    except runtime.MagiHumanError as error:
        return Failed(_code(error), str(error).replace(str(path.parent), "the server's folder"))
    except Exception:
        log.exception("%s has failed", path.parent.name)
        message = "something went wrong in the engine; the server's log has the details"
        return Failed("internal_error", message)
    return Made(video.timings_s, video.warnings)


def _code(error: runtime.MagiHumanError) -> str:
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
