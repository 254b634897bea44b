"""How far an engine is with a video, and bells for those who wait for it to change."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field


@dataclass
class Attempt:
    """How far an engine is with a job. Another attempt has another of these.

    Attributes:
        step, of: steps of the stage that are finished, and how many there are.
        frames: that are decoded.
        live_bytes: of the job's live file that can be read.
        begun_s: when it began, by the monotonic clock.
    """

    step: int = 0
    of: int = 0
    frames: int = 0
    live_bytes: int = 0
    begun_s: float = field(default_factory=time.monotonic)


class Bells:
    """Wakes those who wait for jobs to change. For one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Event] = {}

    async def wait(self, name: str) -> None:
        """Return once a job has changed; who looked at it before without a pause misses nothing."""
        await self._waiting.setdefault(name, asyncio.Event()).wait()

    def ring(self, name: str) -> None:
        """Wake those who wait for a job."""
        if (event := self._waiting.pop(name, None)) is not None:
            event.set()

    def ring_all(self) -> None:
        """Wake everybody, as where the line has moved."""
        for name in list(self._waiting):
            self.ring(name)
