"""The line in front of the engines: who waits, who is made, what becomes of it."""

from __future__ import annotations

import asyncio
import heapq
import logging
import operator
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import (
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from pathlib import Path

from magihuman.runtime.serving.line.attempt import Attempt, Bells
from magihuman.runtime.serving.messages import (
    EngineLost,
    Failed,
    Made,
    Make,
    Report,
    Window,
    Work,
)
from magihuman.runtime.serving.observe.lines import log_end
from magihuman.runtime.serving.settings import Settings
from magihuman.runtime.serving.storage.files import Stored
from magihuman.runtime.serving.store import Job, Status, Store

log = logging.getLogger("magihuman")

SWEEP_S = 5.0
TELLING_PERCENT = 5  # of a video that are done, to tell from it how long the rest takes
PAUSE_S = 1.0  # before another engine is asked
WRITERS = 4  # uploads decoded at once, each of which can take 1 GB
FIRST_GUESS_S = 10.0  # how long a video takes, before one has been made
# Percent at which a stage begins and ends; with super-resolution that takes most of the time.
SHARES = {
    False: {"denoise": (0, 80), "decode_video": (80, 99)},
    True: {"denoise": (0, 25), "super_resolve": (25, 85), "decode_video": (85, 99)},
}


class LineFull(Exception):  # noqa: N818 - an outcome, not a fault
    """As many videos wait as may."""


class EnginesBusy(Exception):  # noqa: N818 - an outcome, not a fault
    """No engine is without a video that is made, or a face that speaks."""


class Draining(Exception):  # noqa: N818 - a state
    """The server is about to stop and takes no more."""


class LeaseLost(Exception):  # noqa: N818 - a state
    """Another process has the video now, or it has been removed."""


class Jobs:
    """Gives the jobs of a store to engines, first in, first out. For one event loop.

    Attributes:
        is_draining: whether new jobs are refused, because the server is about to stop.
        requeued: jobs put back in line because their engine had gone.
        has_live: whether a video can be seen while it is made, and a face talked to.
    """

    has_live = True

    def __init__(self, settings: Settings, make: Make, slots: int) -> None:
        """slots: jobs given to engines at once; at each of them one is made, one gets ready."""
        self.is_draining = False
        self.requeued = 0
        self._settings, self._make = settings, make
        self._jobs = self._open()
        self._slots = asyncio.Semaphore(slots)
        self._abreast = max(1, slots // 2)  # made at a time
        self._of_engine = min(2, slots)  # slots that an engine has
        self._being_made = self._faces = 0
        self._leaving = asyncio.Event()
        self._attempts: dict[str, Attempt] = {}  # of jobs that have not ended
        self._bells = Bells()
        self._writers = asyncio.Semaphore(WRITERS)
        self._arriving = 0  # have a place in line, and are not in the store yet
        # One at a time, so that a job that kills engines cannot take the same others with it twice.
        self._second_try = asyncio.Lock()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._last_s: float | None = None
        self._sweeper: asyncio.Task[None] | None = None

    def _open(self) -> dict[str, Job]:
        """Return the jobs that are known, by their ids, as they are from now on."""
        self._store = Store(self._settings.folder, self._settings.keep_s)
        return self._store.jobs

    def start(self) -> None:
        """Take up what waits, and remove what has expired from now on."""
        for job in self._store.queued():
            self._launch(job)
        self._sweeper = asyncio.create_task(self._sweep())

    def count(self) -> dict[Status, int]:
        """Count the jobs of each status."""
        jobs = self._jobs.values()
        return {status: sum(job.status is status for job in jobs) for status in Status}

    def page(self, after: Job | None, limit: int, newest_first: bool) -> tuple[list[Job], bool]:
        """Return so many jobs, in the order they were asked for, and whether there are more.

        after: the one before the first; None begins at the beginning.
        """
        key = operator.attrgetter("created_at", "id")
        jobs: Iterable[Job] = self._jobs.values()
        if after is not None:
            edge = key(after)
            jobs = [job for job in jobs if (key(job) < edge if newest_first else key(job) > edge)]
        pick = heapq.nlargest if newest_first else heapq.nsmallest
        found = pick(limit + 1, jobs, key)
        return found[:limit], len(found) > limit

    async def ended(self, job: Job) -> None:
        """Return once nothing more is done for a job, be it that the server stops."""
        task = self._tasks.get(job.id)
        if task is not None:
            await asyncio.wait([task])

    def get(self, name: str) -> Job | None:
        """Return the job of this id, or None."""
        return self._jobs.get(name)

    async def find(self, name: str) -> Job | None:
        """Return the job of this id as it is now, whoever has changed it, or None."""
        return self.get(name)

    async def catch_up(self) -> None:
        """Learn of all that others have changed; nobody else changes anything here."""

    def video(self, job: Job) -> Path | Stored:
        """Return the place of the mp4, which is there once the job is completed."""
        return self._store.video(job)

    def live(self, job: Job) -> Path:
        """Return the path of what can be seen of it while it is made."""
        return self._store.live(job)

    def attempt(self, job: Job) -> Attempt:
        """Return how far an engine is with a job that has not ended."""
        return self._attempts.setdefault(job.id, Attempt())

    async def changed(self, job: Job) -> None:
        """Return once a job, or its place in line, has changed."""
        await self._bells.wait(job.id)

    def place(self, job: Job) -> int | None:
        """Return the place in line of a job that waits, from 1."""
        if job.status is not Status.QUEUED:
            return None
        waiting = (other for other in self._jobs.values() if other.status is Status.QUEUED)
        return 1 + sum(other.created_at < job.created_at for other in waiting)

    def seconds_left(self, job: Job) -> float | None:
        """Return about how long a job that has not ended will take yet, where that is known.

        It is told from what is done of it, or else from how long the last video took.
        """
        if job.is_running:
            passed_s = time.monotonic() - self.attempt(job).begun_s
            if job.progress >= TELLING_PERCENT:
                return passed_s * (100 - job.progress) / job.progress
            return None if self._last_s is None else max(0.0, self._last_s - passed_s)
        place = self.place(job)
        if place is None or self._last_s is None:
            return None
        before = self.count()[Status.IN_PROGRESS] + place - 1
        return (before // self._abreast + 1) * self._last_s

    @property
    def retry_after_s(self) -> int:
        """Seconds until a place in line may be free: as many as the last video took."""
        return max(1, min(600, round(self._last_s or FIRST_GUESS_S)))

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """Keep a place in line for a job that is being read; `add`, called at once after, takes it.

        Raises `LineFull` or `Draining` where there is none.
        """
        if self.is_draining:
            raise Draining
        if self.count()[Status.QUEUED] + self._arriving >= self._settings.limits.queued:
            raise LineFull
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[Make]:
        """Keep an engine from videos for as long as the context lasts, for a face that speaks.

        Raises `EnginesBusy` where each has something to make, or `Draining`.
        """
        if self.is_draining:
            raise Draining
        if self._being_made + self._faces >= self._abreast:
            raise EnginesBusy
        self._faces += 1
        try:
            async with AsyncExitStack() as stack:
                for _ in range(self._of_engine):
                    await stack.enter_async_context(self._slots)
                yield self._make
        finally:
            self._faces -= 1

    async def leaving(self) -> None:
        """Return once the server is about to stop."""
        await self._leaving.wait()

    async def add(self, job: Job, fill: Callable[[Path], None]) -> None:
        """Write the job and put it in line, even where whoever asks has gone meanwhile.

        fill: puts the uploads into the folder given, or raises; runs in a thread of its own.
        """
        self._arriving += 1
        await asyncio.shield(asyncio.create_task(self._add(job, fill)))

    async def _add(self, job: Job, fill: Callable[[Path], None]) -> None:
        def write() -> None:
            with self._store.create(job) as folder:
                fill(folder)

        try:
            async with self._writers:
                await asyncio.to_thread(write)
        finally:
            self._arriving -= 1
        self._jobs[job.id] = job
        if not self.is_draining:  # else it is on disk for the next start
            self._launch(job)

    async def remove(self, job: Job) -> None:
        """Forget a job; what is being made of it is cancelled.

        Raises:
            OSError: the disk refuses, and nothing has changed.
        """
        self._store.remove(job)
        self._cancel(job)

    def _cancel(self, job: Job) -> None:
        """Give up what is being made of a job that is no more."""
        task = self._tasks.get(job.id)
        if task is not None:
            task.cancel()
        self._attempts.pop(job.id, None)
        self._bells.ring_all()

    async def drain(self, bound_s: float) -> None:
        """Take no more jobs, let those being made end within so many seconds; all others stay."""
        self.is_draining = True
        self._leaving.set()
        self._bells.ring_all()
        running = []
        for name, task in self._tasks.items():
            job = self.get(name)
            if job is not None and job.is_running:
                running.append(task)
            else:
                task.cancel()
        if running:
            await asyncio.wait(running, timeout=bound_s)
        await self.close()

    async def close(self) -> None:
        """Give up what is being made; it is queued again on disk."""
        self.is_draining = True
        self._leaving.set()
        self._bells.ring_all()
        tasks = [*self._tasks.values(), *filter(None, [self._sweeper])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._store.save_again()

    def _launch(self, job: Job) -> None:
        task = asyncio.create_task(self._run(job))
        self._tasks[job.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(job.id))

    async def _run(self, job: Job) -> None:
        while job.status is Status.QUEUED:
            async with self._second_try if job.attempts else nullcontext(), self._slots:
                is_lost = not await self._try(job)
            if is_lost:
                await asyncio.sleep(PAUSE_S)
        log_end(job)

    async def _try(self, job: Job) -> bool:
        """Have an engine make a job, and return whether it was there until the end."""
        try:
            await self._attempt(job)
        except EngineLost as lost:
            log.warning("%s has lost its engine: %s", job.id, str(lost).partition("\n")[0])
            self.requeued += 1
            if job.is_running:
                await self._put_back(job, is_its_fault=True)
            self._start_over(job)
            return False
        except asyncio.CancelledError:
            if job.id in self._jobs and job.is_running:
                await self._put_back(job, is_its_fault=False)
                self._start_over(job)
            raise
        except LeaseLost:
            raise
        except Exception:
            log.exception("%s has failed", job.id)
            message = "something went wrong in the server; its log has the details"
            await self._fail(job, "internal_error", message)
            self._start_over(job)
        return True

    async def _begin(self, job: Job) -> None:
        self._store.begin(job)

    async def _complete(self, job: Job, made: Made) -> None:
        self._store.complete(job, made.timings_s, made.warnings)

    async def _fail(self, job: Job, code: str, message: str) -> None:
        self._store.fail(job, code, message)

    async def _put_back(self, job: Job, is_its_fault: bool) -> None:
        self._store.back_in_line(job, is_its_fault)

    def _work(self, job: Job) -> Work:
        """Return what an engine is told. Raises `InvalidRequestError`."""
        store = self._store
        request, save, live = store.request(job), store.video(job), store.live(job)
        return Work(request, save, self._settings.timeout_s, live)

    def _start_over(self, job: Job) -> None:
        """Forget an attempt that has ended."""
        self._attempts.pop(job.id, None)
        self._bells.ring_all()

    async def _attempt(self, job: Job) -> None:
        self._being_made += 1
        try:
            await self._made(job)
        finally:
            self._being_made -= 1

    async def _made(self, job: Job) -> None:
        work = self._work(job)
        start = time.monotonic()
        async with aclosing(self._make(work)) as events:
            async for event in events:
                match event:
                    case Report() | Window():
                        await self._note(job, event)
                    case Made():
                        self._last_s = time.monotonic() - start
                        job.peak_memory_mb = event.peak_memory_mb
                        await self._complete(job, event)
                        self._start_over(job)
                        return
                    case Failed():
                        await self._fail(job, event.code, event.message)
                        self._start_over(job)
                        return
        raise EngineLost("it said nothing of the end")

    async def _note(self, job: Job, event: Report | Window) -> None:
        """Take how far an engine is."""
        attempt = self.attempt(job)
        if job.status is Status.QUEUED:
            attempt.begun_s = time.monotonic()
            await self._begin(job)
            self._bells.ring_all()
        match event:
            case Report(stage, step, of):
                job.stage, attempt.step, attempt.of = stage, step, of
                job.progress = self._percent(event, job.progress)
            case Window(frames, live_bytes):
                attempt.frames, attempt.live_bytes = frames, live_bytes
        self._bells.ring(job.id)

    def _percent(self, report: Report, before: int) -> int:
        first, last = SHARES[self._settings.sr is not None].get(report.stage, (before, before))
        return int(first + (last - first) * report.step / report.of) if report.of else before

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                self._store.sweep()
            except Exception:  # it goes on all the same
                log.exception("the sweep of the videos' folder has failed")
