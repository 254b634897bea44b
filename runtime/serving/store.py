"""Jobs and their videos on disk, which a restart finds as they were.

    records.sqlite            of each job, what was asked for and how far it is
    video_0123.../image       the reference image and the voice as uploaded, until the job has ended
    video_0123.../audio
    video_0123.../live.mp4    grows while the video is made; goes where that fails
    video_0123.../video.mp4   there once it is whole

Every other change is a rename or a transaction, so that a process killed at any moment leaves no
half-written state. A record whose folder has gone is of a job that was removed. Earlier releases
kept each record in its folder, as `job.json`: those go into the database when they are found.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from magihuman.runtime.files import (
    atomic_folder,
    close_to_others,
    sync,
    sync_folder,
)
from magihuman.runtime.request import Request
from magihuman.runtime.serving import record
from magihuman.runtime.serving.record import (
    AUDIO,
    IMAGE,
    LIVE,
    MAX_ATTEMPTS,
    MAX_STATE_BYTES,
    PREFIX,
    STATE,
    VIDEO,
    Job,
    Status,
    request_of,
)
from magihuman.runtime.serving.records.database import FILE, Database, RecordsError, in_folder
from magihuman.runtime.serving.records.locking import locked
from magihuman.runtime.serving.records.records import Records

__all__ = [
    "AUDIO",
    "IMAGE",
    "MAX_ATTEMPTS",
    "STATE",
    "Job",
    "Status",
    "Store",
    "locked",
    "request_of",
]

log = logging.getLogger("magihuman")

DRAFT, REMOVED = ".magihuman-", ".removed-"  # drafts are those of `files`

CLOCK_SET_S = 1.0  # less is how clocks are kept right all the time


class Store:
    """The jobs in a folder. For one thread, but for `create`."""

    def __init__(self, folder: Path, keep_s: float) -> None:
        """Read what is there; jobs that were being made are queued again, see `back_in_line`."""
        self.jobs: dict[str, Job] = {}
        self._clock_s = time.time() - time.monotonic()  # changes only where the clock is set
        self._unsaved: set[str] = set()  # whose state the disk has not taken yet
        self._removed: set[Path] = set()  # folders of which something is left
        self._folder, self._keep_s = folder, keep_s
        self._dropped: set[str] = set()  # jobs without a folder whose record is still there
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._records = Records(Database(in_folder(self._folder)))
        names = os.listdir(self._folder)
        self._removed.update(self._folder / n for n in names if n.startswith((DRAFT, REMOVED)))
        self._clear()
        self._close_to_others()
        self._take_up(name for name in names if name.startswith(PREFIX))

    def queued(self) -> list[Job]:
        """Return the jobs that wait, oldest first."""
        waiting = (job for job in self.jobs.values() if job.status is Status.QUEUED)
        return sorted(waiting, key=lambda job: job.created_at)

    def video(self, job: Job) -> Path:
        """Return the path of the mp4, which is there once the job is completed."""
        return self._folder / job.id / VIDEO

    def live(self, job: Job) -> Path:
        """Return the path of what can be seen of the video while it is made."""
        return self._folder / job.id / LIVE

    def request(self, job: Job) -> Request:
        """Return what an engine is to make."""
        return request_of(job, self._folder / job.id)

    @contextmanager
    def create(self, job: Job) -> Iterator[Path]:
        """Give a folder for the uploads, the job's once the context ends well. For any thread."""
        is_kept = False
        try:
            with atomic_folder(self._folder / job.id, 0o700) as draft:
                yield draft
                for name in (IMAGE, AUDIO):
                    if (draft / name).exists():
                        sync(draft / name)
                if len(json.dumps(record.kept(job))) > MAX_STATE_BYTES:  # no restart would read it
                    raise OSError(errno.EFBIG, "the state of a job is too large")
                is_kept = True
                self._records.save(job)
        except BaseException:
            if is_kept:
                self._drop(job.id)
            raise
        sync_folder(self._folder)

    def begin(self, job: Job) -> None:
        """Note that an engine has taken the job."""
        job.status, job.started_at = Status.IN_PROGRESS, time.time()
        job.attempts += 1
        self._save(job)

    def complete(self, job: Job, timings_s: dict[str, float], warnings: tuple[str, ...]) -> None:
        """Note that the video is there. warnings: beside those that the job has already."""
        with suppress(OSError):
            close_to_others(self.video(job))
        job.status, job.progress = Status.COMPLETED, 100
        job.timings_s, job.warnings = dict(timings_s), [*job.warnings, *warnings]
        self._end(job)

    def fail(self, job: Job, code: str, message: str) -> None:
        """Note that there will be no video, and why."""
        self._forget_live(job)
        job.status, job.error = Status.FAILED, {"code": code, "message": message}
        self._end(job)

    def back_in_line(self, job: Job, is_its_fault: bool) -> None:
        """Queue a job again whose engine has gone, unless this has happened before.

        is_its_fault: whether this counts; it does not where the server itself gave the job up.
        """
        self._forget_live(job)
        if is_its_fault:
            self._clear_drafts(job)
        if is_its_fault and job.attempts >= MAX_ATTEMPTS:
            self.fail(job, *record.engine_lost(job.attempts))
            return
        if not is_its_fault:
            job.attempts -= 1
        job.status, job.started_at, job.stage, job.progress = Status.QUEUED, None, None, 0
        self._save(job)

    def remove(self, job: Job) -> None:
        """Forget it and all its files. Whoever is writing one of them has his error.

        Raises:
            OSError: the disk refuses, and the job is there as before.
        """
        gone = self._folder / f"{REMOVED}{job.id}-{secrets.token_hex(4)}"
        with suppress(FileNotFoundError):  # removed by hand
            (self._folder / job.id).rename(gone)  # at once, whatever is being written into it
            sync_folder(self._folder)
        del self.jobs[job.id]
        self._unsaved.discard(job.id)
        self._removed.add(gone)
        self._drop(job.id)
        self._clear()

    def sweep(self) -> None:
        """Try again what the disk has refused, and remove what has been kept for long enough."""
        self.save_again()
        self.expire()
        self._clear()
        if self._dropped:
            self._drop()

    def save_again(self) -> None:
        """Write the states that the disk has not taken before."""
        for name in list(self._unsaved):
            job = self.jobs[name]
            if self._save(job):
                log.warning("the state of %s, %s, is written now", name, job.status.value)

    def expire(self) -> None:
        """Remove what has been kept for long enough; what the disk refuses is tried again."""
        self._follow_clock()
        now = time.time()
        for job in list(self.jobs.values()):
            if job.has_ended and job.expires_at is not None and job.expires_at <= now:
                try:
                    self.remove(job)
                except OSError:
                    log.exception("%s has expired, and cannot be removed", job.id)

    def _follow_clock(self) -> None:
        """Move the times to expire where the clock has been set: they are so far off as before."""
        moved_s = time.time() - time.monotonic() - self._clock_s
        if abs(moved_s) < CLOCK_SET_S:
            return
        self._clock_s += moved_s
        log.warning("the clock has been set by %.0f s; times to expire follow it", moved_s)
        for job in self.jobs.values():
            if job.expires_at is not None:
                job.expires_at += moved_s
                self._save(job)

    def _clear_drafts(self, job: Job, names: Iterable[str] | None = None) -> None:
        """Remove what a process that has died has left half-written beside the state.

        names: what lies there, where it is known.
        """
        folder = self._folder / job.id
        with suppress(OSError):
            for name in os.listdir(folder) if names is None else names:
                if name.startswith(DRAFT):
                    (folder / name).unlink()

    def _forget_live(self, job: Job) -> None:
        with suppress(OSError):
            self.live(job).unlink(missing_ok=True)

    def _drop(self, *names: str) -> None:
        """Remove records of jobs that have no folder, or else try again with the next sweep."""
        self._dropped.update(names)
        gone = set(self._dropped)
        with suppress(RecordsError):
            self._records.remove(gone)
            self._dropped -= gone

    def _clear(self) -> None:
        for place in list(self._removed):
            with suppress(OSError):
                shutil.rmtree(place) if place.is_dir() else place.unlink()
            if not os.path.lexists(place):
                self._removed.discard(place)

    def _close_to_others(self) -> None:
        """Let nobody else in, unless other things lie in the folder: others may need those."""
        is_shared = any(
            not name.startswith((".", PREFIX, FILE)) for name in os.listdir(self._folder)
        )
        place = self._folder
        try:
            if not is_shared:
                close_to_others(place)
            for place in _open_to_others(self._folder):
                close_to_others(place)
        except OSError as error:
            log.warning("%s could not be closed to other users: %s", place, error.strerror)
        if is_shared and self._folder.stat().st_mode & 0o077:
            log.warning(
                "%s holds other things too, and stays open to other users as it was, though its"
                " videos are not; give the server a folder of its own",
                self._folder,
            )

    def _take_up(self, names: Iterable[str]) -> None:
        """Find the jobs of these folders, by their records, and go on from how each was left."""
        known = self._records.load()
        strange: list[Job] = []
        for name in names:
            is_known = name in known
            found = _found(self._folder / name, known.pop(name)) if is_known else None
            if not is_known and (found := _read(self._folder / name)) is not None:
                strange.append(found[0])
            if found is not None:
                self.jobs[name] = found[0]
                self._recover(*found)
        self._take_over(strange)
        if known:
            self._drop(*known)

    def _take_over(self, jobs: list[Job]) -> None:
        """Take records of an earlier release into the database, at once or with the next sweeps."""
        if not jobs:
            return
        log.warning("%d records of an earlier release go into %s", len(jobs), FILE)
        self._unsaved.update(job.id for job in jobs)
        try:
            self._records.save(*jobs)
        except RecordsError:
            log.exception("they could not all be written; this is tried again")
            return
        for job in jobs:
            with suppress(OSError):
                self._tidy(job)
                self._unsaved.discard(job.id)

    def _recover(self, job: Job, held: Mapping[str, bool]) -> None:
        """Go on from how a job was left. held: what lies in its folder."""
        self._clear_drafts(job, held)
        is_made = held.get(VIDEO, False)  # whole, or it would not have its name
        if job.status is Status.IN_PROGRESS and is_made:
            self._forget_live(job)  # the end of it may be missing
            self.complete(job, job.timings_s, ())
        elif job.status is Status.IN_PROGRESS:
            self.back_in_line(job, is_its_fault=True)
        elif job.status is Status.COMPLETED and not is_made:
            self.fail(job, "lost", "the video's file has been removed from the server's folder")
        self._bound_expiry(job)

    def _bound_expiry(self, job: Job) -> None:
        """Keep what has ended no longer than from now on, whatever the clock said when it ended."""
        latest_s = time.time() + self._keep_s
        if job.has_ended and (job.expires_at is None or job.expires_at > latest_s):
            job.expires_at = latest_s
            self._save(job)

    def _end(self, job: Job) -> None:
        self._follow_clock()  # before there is a time by the new one
        job.stage, job.completed_at = None, time.time()
        job.expires_at = job.completed_at + self._keep_s
        self._save(job)

    def _tidy(self, job: Job) -> None:
        """Remove the files that a job, whose record is written, needs no more. Raises `OSError`."""
        for name in (STATE, IMAGE, AUDIO) if job.has_ended else (STATE,):
            (self._folder / job.id / name).unlink(missing_ok=True)

    def _save(self, job: Job) -> bool:
        """Write the state, and return whether the disk took it. A full one holds nothing up.

        Of a job that has ended, the uploads then go; before, another start needs them.
        """
        if job.id not in self.jobs:  # removed while it was being made
            return False
        try:
            self._records.save(job)
            self._tidy(job)
        except OSError:
            if job.id not in self._unsaved:  # said once
                log.exception("the state of %s, %s, could not be written", job.id, job.status.value)
            self._unsaved.add(job.id)
            return False
        self._unsaved.discard(job.id)
        return True


def _open_to_others(folder: Path) -> Iterator[Path]:
    """Yield the jobs' folders, and what lies in them, that others may use. No link is followed."""
    with os.scandir(folder) as entries:
        ours = [entry for entry in entries if entry.name.startswith((PREFIX, FILE))]
    for job in ours:
        if job.is_symlink():
            continue
        inside = list(os.scandir(job.path)) if job.is_dir() else []
        for entry in (job, *inside):
            if not entry.is_symlink() and entry.stat().st_mode & 0o077:
                yield Path(entry.path)


def _found(place: Path, job: Job | None) -> tuple[Job, Mapping[str, bool]] | None:
    """Return the job of a record with what lies in its folder, or None, with a line in the log.

    job: None where its record cannot be used, which has been logged.
    """
    if job is None:
        return None
    try:
        held = record.held(place)
        record.check_files(held)
        return job, held
    except (OSError, ValueError) as error:
        log.warning("%s is left alone: %.300s", place, error)
        return None


def _read(place: Path) -> tuple[Job, Mapping[str, bool]] | None:
    """Read the job of a folder that has no record, and what lies there, by `record.held`.

    None, and a line in the log, where there is none to be had.
    """
    try:
        held = record.held(place)
        return record.read(place, held), held
    except (OSError, ValueError) as error:
        log.warning(
            "%s is left alone: it has no record, and its %s cannot be used (%.300s)",
            place,
            STATE,
            error,
        )
        return None
