"""What this process knows of the videos that it shares, which others change, too."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import ParamSpec, TypeVar

from magihuman.runtime.serving.jobs import Jobs
from magihuman.runtime.serving.record import Job
from magihuman.runtime.serving.records.database import Database, RecordsError
from magihuman.runtime.serving.records.leases import Row, SharedRecords
from magihuman.runtime.serving.settings import Shared
from magihuman.runtime.serving.storage.files import Storage

log = logging.getLogger("magihuman")

FOLLOW_S = 0.5  # after which changes of others are looked for
DATABASE_THREADS = 4
P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Known:
    """What this process knows of a video.

    Attributes:
        held: the generation in which this process has it, None where it has not.
    """

    job: Job
    generation: int
    revision: int
    held: int | None = None


class FollowingJobs(Jobs):
    """Jobs that are read from a database. For one event loop."""

    def _open(self) -> dict[str, Job]:
        assert self._settings.shared is not None
        shared: Shared = self._settings.shared
        self._lease_s, self._storage = shared.lease_s, Storage(shared.storage)
        self._database = Database(shared.database)
        self._threads = ThreadPoolExecutor(DATABASE_THREADS, "database")
        self._records = SharedRecords(self._database, secrets.token_hex(16), shared.lease_s)
        self._known: dict[str, Known] = {}
        self._reading = asyncio.Lock()  # what was read first is taken first
        self._waiting = asyncio.Event()  # there may be a video to take
        self._own: list[asyncio.Task[None]] = []
        self._is_away = False
        return {}

    async def find(self, name: str) -> Job | None:
        """Return the job of this id as the database has it, or None. Raises `RecordsError`."""
        async with self._reading:
            row = await self._ask(self._records.find, name)
            if row is not None:
                self._apply(row)
            elif name in self._known:
                self._forget(name)
        return self.get(name)

    async def catch_up(self) -> None:
        """Learn of all that others have changed. Raises `RecordsError`."""
        async with self._reading:
            for row in await self._ask(self._records.changes):
                self._apply(row)

    def _apply(self, row: Row) -> None:
        known = self._known.get(row.id)
        if row.job is None:
            self._forget(row.id)
        elif known is None:
            self._known[row.id] = Known(row.job, row.generation, row.revision)
            self._jobs[row.id] = row.job
        elif row.revision > known.revision:
            self._update(known, row)
        if row.job is not None and not row.job.has_ended and row.owner is None:
            self._waiting.set()

    def _update(self, known: Known, row: Row) -> None:
        """Take over what a row says; of a video that this process has, it says nothing new."""
        known.revision, known.generation = row.revision, row.generation
        self._jobs[row.id] = known.job
        if known.held == row.generation:
            return
        if known.held is not None:
            self._lose(known)
        assert row.job is not None
        has_moved = known.job.status is not row.job.status
        for each in fields(Job):
            setattr(known.job, each.name, getattr(row.job, each.name))
        if has_moved:
            self._start_over(known.job)
        self._bells.ring(known.job.id)

    def _forget(self, name: str) -> None:
        """Drop a video that has been removed."""
        known = self._known.pop(name, None)
        if known is not None:
            self._jobs.pop(name, None)
            self._cancel(known.job)

    def _lose(self, known: Known) -> None:
        """Stop what is made of a video that another process has now."""
        log.warning("%s is no longer of this process", known.job.id)
        known.held = None
        if (task := self._tasks.get(known.job.id)) is not None:
            task.cancel()

    async def _follow(self) -> None:
        while True:
            with self._noted():
                await self.catch_up()
            await asyncio.sleep(FOLLOW_S)

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Log once that the database is away, and once that it is back; nothing here ends by it."""
        try:
            yield
        except RecordsError as error:
            if not self._is_away:
                log.warning("the database cannot be used: %s", error.strerror)
            self._is_away = True
        else:
            if self._is_away:
                log.warning("the database can be used again")
            self._is_away = False

    async def _ask(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the database from a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(call, *args, **kwargs))
