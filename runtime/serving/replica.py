"""An engine that takes work one message after the other. Knows nothing of HTTP, nor of Ray."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import resource
import secrets
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Gauge

from magihuman import runtime
from magihuman.runtime.files import sync
from magihuman.runtime.hooks import Hooks
from magihuman.runtime.media import FragmentWriter, check_output
from magihuman.runtime.serving.face.speaking import speak
from magihuman.runtime.serving.messages import (
    Event,
    Failed,
    Figures,
    LiveWork,
    Made,
    Put,
    Report,
    Window,
    Work,
    failure,
    told,
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
        hooks: Sequence[Hooks] = (),
        encoding: dict[str, Any] | None = None,
    ) -> None:
        """options: of `runtime.load`. warmup: sizes as for `Engine.warmup`. hooks: beside those
        that count for Prometheus. encoding: of `runtime.Output`, beside its path.
        """
        self._encoding = encoding or {}
        self.registry = CollectorRegistry()
        self._name, self._order = secrets.token_hex(8), itertools.count()
        hooks = [runtime.PrometheusHooks(self.registry), *hooks]
        self._engine = runtime.load(**options, hooks=hooks)
        _count(self.registry, options.get("context_parallel", 1))
        if warmup:
            self._engine.warmup(warmup)

    def check_health(self) -> None:
        """Raise where the engine can make no more videos."""
        if not self._engine.is_usable:
            raise RuntimeError("the engine can make no more videos; start another process")

    async def make(self, work: Work | LiveWork) -> AsyncGenerator[Event, None]:
        """Make one video, or have a face speak, and say how far it is. Closing this, or cancelling
        it, gives it up.

        Raises:
            EngineLost: the engine has failed for good.
        """
        yield Report("prepare", 0, 0)
        _count_memory()
        if isinstance(work, LiveWork):
            making = speak(self._engine, work)
        else:
            making = told(partial(self._made, work))
        async with aclosing(making) as events:
            async for event in events:
                yield event

    async def _made(self, work: Work, put: Put) -> Made | Failed:
        """Make a video, and return how that ended."""
        folder = work.save.parent
        try:
            last = await self._film(work, put)
            await asyncio.to_thread(sync, work.save)
        except Exception as error:
            failed = failure(error, folder.name)
            message = failed.message.replace(str(folder), "the server's folder")
            return replace(failed, message=message)
        return Made(last.timings_s, last.warnings, _peak_memory_mb())

    async def _film(self, work: Work, put: Put) -> runtime.Chunk:
        """Make the clip, and return its last chunk. put: takes how far it is, and a window once it
        can be read.
        """
        loop = asyncio.get_running_loop()

        def tell(progress: runtime.Progress) -> None:
            report = Report(progress.stage, progress.step, progress.of)
            loop.call_soon_threadsafe(put, report)

        last: runtime.Chunk | None = None
        live = _LiveFile(work)
        save = runtime.Output(work.save, **self._encoding)
        chunks = self._engine.agenerate_stream(
            work.request, save=save, on_progress=tell, deadline_s=work.deadline_s
        )
        try:
            async with chunks:
                async for chunk in chunks:
                    last = chunk
                    written = await asyncio.to_thread(live.add, chunk)
                    put(Window(chunk.first_frame + len(chunk.frames), written))
        finally:
            await asyncio.to_thread(live.close)
        assert last is not None  # a clip has a frame
        return last

    def figures(self) -> Figures:
        """Return what the engine has counted up to now."""
        order = next(self._order)
        plan = self._engine.memory_plan
        room_bytes = {} if plan is None else plan.room_bytes
        families = list(self.registry.collect())
        return Figures(self._name, os.getpid(), order, families, room_bytes)

    def close(self) -> None:
        """Free the memory."""
        self._engine.close()


class _LiveFile:
    """What can be seen of a clip while it is made. Nothing that becomes of it costs the clip."""

    def __init__(self, work: Work) -> None:
        self._path, self._seconds = work.live, work.request.seconds
        self._writer: FragmentWriter | None = None
        self._using = threading.RLock()  # a task that is cancelled leaves its thread behind

    def add(self, chunk: runtime.Chunk) -> int:
        """Write a chunk, and return how many bytes can be read now; 0 where there are none."""
        with self._using:
            if self._path is None:
                return 0
            try:
                return self._write(self._path, chunk)
            except Exception as error:  # of the disk, or of FFmpeg
                name = self._path.parent.name
                log.warning("%s cannot be watched while it is made: %r", name, error)
                with suppress(OSError):
                    self._path.unlink(missing_ok=True)
                self.close()
                return 0

    def close(self) -> None:
        """Close the file, which stays, and take no more."""
        with self._using:
            self._path = None
            if self._writer is not None:
                self._writer.close()

    def _write(self, path: Path, chunk: runtime.Chunk) -> int:
        height, width = chunk.frames.shape[1:3]
        # What room there is belongs to the clip.
        check_output(path, math.ceil(self._seconds * chunk.fps), width, height)
        if self._writer is None:
            self._writer = FragmentWriter(path, chunk.fps, chunk.sample_rate_hz)
        return self._writer.add(chunk.frames, chunk.audio, chunk.is_last)


def _count(registry: CollectorRegistry, devices: int) -> None:
    """Add an engine, and its GPUs or the processes that it has on a CPU, to the figures."""
    Gauge("magihuman_engines", "Engines that run.", registry=registry).set(1)
    name, meaning = "magihuman_engine_devices", "GPUs of the engines; on a CPU, their processes."
    Gauge(name, meaning, registry=registry).set(devices)


def _count_memory() -> None:
    """Let what a GPU holds at most be counted from now on."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _peak_memory_mb() -> float:
    """Return what a GPU has held at most since `_count_memory`; on a CPU, the process ever."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
