"""The line that several API processes share: each takes what waits, under a lease."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from magihuman.runtime.serving.jobs import PAUSE_S, SWEEP_S, LeaseLost
from magihuman.runtime.serving.messages import Made, Stays, Work
from magihuman.runtime.serving.observe.lines import log_end
from magihuman.runtime.serving.record import (
    AUDIO,
    IMAGE,
    MAX_ATTEMPTS,
    VIDEO,
    Job,
    Status,
    engine_lost,
    request_of,
)
from magihuman.runtime.serving.records.leases import Row
from magihuman.runtime.serving.shared.following import FollowingJobs, Known
from magihuman.runtime.serving.storage.files import StorageError, Stored

log = logging.getLogger("magihuman")

RENEWALS = 3  # of a lease, while it lasts
BURIED_S = 3600.0  # that a deleted video's record stays, to remove what comes late of it
NOWHERE = Path("/nonexistent")


class SharedJobs(FollowingJobs):
    """Jobs of a database that other processes change, too. For one event loop.

    Nothing is told a client of the end of a video before the database has it.
    """

    has_live = False

    def start(self) -> None:
        """Follow what others do, take what waits, and keep what was taken."""
        for forever in (self._follow, self._take, self._renew, self._sweep):
            self._own.append(asyncio.create_task(forever()))

    # -- the line ----------------------------------------------------------------------------------

    async def _add(self, job: Job, fill: Callable[[Path], None]) -> None:
        self._known[job.id] = Known(job, generation=0, revision=0)  # before others tell of it
        try:
            async with self._writers:
                row = await asyncio.to_thread(self._create, job, fill)
        except BaseException:
            del self._known[job.id]
            raise
        finally:
            self._arriving -= 1
        self._apply(row)

    def _create(self, job: Job, fill: Callable[[Path], None]) -> Row:
        """Put the uploads into the storage, and then the job in line."""
        with TemporaryDirectory(dir=self._settings.folder, prefix=".magihuman-") as folder:
            fill(Path(folder))
            with self._kept(job):
                for name in (IMAGE, AUDIO):
                    if (file := Path(folder, name)).exists():
                        self._storage.put(file, f"{job.id}/{name}")
                return self._records.add(job)

    @contextmanager
    def _kept(self, job: Job) -> Iterator[None]:
        """Remove a job's files again where the context does not end well."""
        try:
            yield
        except BaseException:
            with suppress(StorageError):
                self._storage.remove(job.id)
            raise

    async def remove(self, job: Job) -> None:
        """Forget a job, whichever process makes it. Raises `RecordsError`."""
        await self._ask(self._records.delete, job.id)
        self._forget(job.id)
        await asyncio.to_thread(self._clear, job.id)

    def _clear(self, name: str) -> bool:
        """Remove a job's files, and return whether that could be done."""
        try:
            self._storage.remove(name)
        except StorageError as error:
            log.warning("%s cannot be removed from the storage yet: %s", name, error.strerror)
            return False
        return True

    async def ended(self, job: Job) -> None:
        """Return once nothing more is done for a job, be it that the server stops."""
        while self._jobs.get(job.id) is job and not job.has_ended and not self.is_draining:
            with suppress(TimeoutError):
                async with asyncio.timeout(SWEEP_S):
                    await self.changed(job)

    def video(self, job: Job) -> Path | Stored:
        """Return the place of the mp4, which is there once the job is completed."""
        return Stored(self._storage, self._video(job))

    def live(self, job: Job) -> Path:
        """Return a path where nothing is: no other process could see it grow."""
        return NOWHERE

    def _video(self, job: Job) -> str:
        """Return the name of the mp4: each owner writes one of its own."""
        stem, _, suffix = VIDEO.partition(".")
        return f"{job.id}/{stem}-{self._known[job.id].generation}.{suffix}"

    # -- what this process has ---------------------------------------------------------------------

    async def _take(self) -> None:
        """Take what waits, the oldest first, as long as there is a place for it."""
        while True:
            await self._slots.acquire()
            try:
                job = await self._taken()
            except BaseException:
                self._slots.release()
                raise
            task = asyncio.create_task(self._run(job))
            self._tasks[job.id] = task
            task.add_done_callback(partial(self._given_up, job.id))

    def _given_up(self, name: str, task: asyncio.Task[None]) -> None:
        self._slots.release()
        if self._tasks.get(name) is task:
            del self._tasks[name]
            if (known := self._known.get(name)) is not None:
                known.held = None
        self._waiting.set()

    async def _taken(self) -> Job:
        """Return the next video, once there is one."""
        while True:
            self._waiting.clear()
            with self._noted():
                row = await self._claimed()
                if row is not None and await self._is_to_be_made(row):
                    return self._jobs[row.id]
                if row is not None:
                    continue
            with suppress(TimeoutError):
                async with asyncio.timeout(PAUSE_S):
                    await self._waiting.wait()

    async def _claimed(self) -> Row | None:
        """Take the oldest video that nobody has."""
        async with self._reading:
            row = await self._ask(self._records.claim)
            if row is not None:
                self._apply(row)
                if (known := self._known.get(row.id)) is not None:
                    known.held = row.generation
        return row

    async def _is_to_be_made(self, row: Row) -> bool:
        """Whether a video that was just taken waits; else put back what its owner has left."""
        known = self._known.get(row.id)
        if known is None:  # it has gone, or its record cannot be used, which has been logged
            return False
        if known.job.status is Status.QUEUED:
            return True
        log.warning("%s was being made by a process that has gone", row.id)
        with suppress(LeaseLost):
            await self._put_back(known.job, is_its_fault=True)
        if known.job.has_ended:
            log_end(known.job)
        return False

    async def _run(self, job: Job) -> None:
        """Make a video that this process has, once."""
        try:
            async with self._second_try if job.attempts else nullcontext():
                is_lost = not await self._try(job)
            if is_lost:
                await asyncio.sleep(PAUSE_S)
        except LeaseLost:
            self._start_over(job)
            return
        finally:
            await self._give_back(job)
        if job.has_ended:
            log_end(job)

    async def _give_back(self, job: Job) -> None:
        """Leave a video that no engine has begun to others."""
        known = self._known.get(job.id)
        if known is not None and known.held is not None and job.status is Status.QUEUED:
            with suppress(LeaseLost):
                await self._write(job, is_given_up=True)

    def _work(self, job: Job) -> Work:
        stays = Stays(self._storage.url, job.id, self._video(job))
        request, save = request_of(job, NOWHERE), Path(job.id, VIDEO)
        return Work(request, save, self._settings.timeout_s, stays=stays)

    async def _begin(self, job: Job) -> None:
        await self._write(job, status=Status.IN_PROGRESS, attempts=job.attempts + 1)

    async def _complete(self, job: Job, made: Made) -> None:
        told: dict[str, Any] = {"timings_s": dict(made.timings_s), "progress": 100}
        told["warnings"] = [*job.warnings, *made.warnings]
        await self._end(job, status=Status.COMPLETED, **told)

    async def _fail(self, job: Job, code: str, message: str) -> None:
        await self._end(job, status=Status.FAILED, error={"code": code, "message": message})

    async def _end(self, job: Job, **changes: Any) -> None:
        await self._write(job, is_given_up=True, stage=None, **changes)
        await asyncio.to_thread(self._drop_uploads, job)

    def _drop_uploads(self, job: Job) -> None:
        with suppress(StorageError):
            for name in self._storage.names(job.id) & {IMAGE, AUDIO}:
                self._storage.remove(f"{job.id}/{name}")

    async def _put_back(self, job: Job, is_its_fault: bool) -> None:
        if is_its_fault and job.attempts >= MAX_ATTEMPTS:
            await self._fail(job, *engine_lost(job.attempts))
            return
        attempts = job.attempts - (not is_its_fault)
        again: dict[str, Any] = {"started_at": None, "stage": None, "progress": 0}
        await self._write(job, is_given_up=True, status=Status.QUEUED, attempts=attempts, **again)

    async def _write(self, job: Job, is_given_up: bool = False, **changes: Any) -> None:
        """Change a video that this process has; the job says so once the database does.

        Waits for a database that is away. Raises `LeaseLost` where another process has the video.
        """
        known, keep_s = self._known.get(job.id), self._settings.keep_s
        if known is None or known.held is None:
            raise LeaseLost
        new, held = replace(job, **changes), known.held
        row: Row | None = None
        is_written = False
        while not is_written:
            with self._noted():
                row = await self._ask(self._records.save, new, held, is_given_up, keep_s)
                is_written = True
            if not is_written:
                await asyncio.sleep(PAUSE_S)
        if is_given_up or row is None:
            known.held = None
        if row is None or row.job is None:
            log.warning("%s has been taken by another process, or removed", job.id)
            raise LeaseLost
        known.revision = max(known.revision, row.revision)
        for each in fields(Job):
            setattr(job, each.name, getattr(row.job, each.name))

    # -- again and again ---------------------------------------------------------------------------

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / RENEWALS)
            all_known = self._known.items()
            held = {name: (k.held, k.job) for name, k in all_known if k.held is not None}
            if not held:
                continue
            with self._noted():
                kept = await self._ask(self._records.renew, held)
                for name in held.keys() - kept:
                    known = self._known.get(name)
                    if known is not None and known.held == held[name][0]:
                        self._lose(known)

    async def _sweep(self) -> None:
        while True:
            with self._noted():
                await self._clean()
            await asyncio.sleep(SWEEP_S)

    async def _clean(self) -> None:
        """Remove what has been kept for long enough, and the last of what was deleted."""
        for name in await self._ask(self._records.expired):
            await self._ask(self._records.delete, name)
            self._forget(name)
            await asyncio.to_thread(self._clear, name)
        old = await self._ask(self._records.deleted, BURIED_S)
        if gone := [name for name in old if await asyncio.to_thread(self._clear, name)]:
            await self._ask(self._records.purge, gone)

    async def close(self) -> None:
        """Give up what is being made; others may take it."""
        self.is_draining = True
        self._leaving.set()
        self._bells.ring_all()
        for tasks in (self._own, list(self._tasks.values())):  # nothing is taken any more
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown)  # of what was given up while it was asked
        self._database.close()
