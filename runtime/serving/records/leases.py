"""Records that several processes share: one at a time has a video, by a lease, until it renews it.

Each change of a video that somebody has is made only where its owner still has it, and in the
generation that the owner took. So a video ends once, whoever is late. Times are the database's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql.dml import ReturningUpdate

from magihuman.runtime.serving.record import Job, Status
from magihuman.runtime.serving.records.database import Database
from magihuman.runtime.serving.records.records import job_of, row_of
from magihuman.runtime.serving.records.tables import VIDEOS

DELETED = "deleted"  # a status of rows that stay for a while, so that all processes learn of it
OVERLAP_S = 10.0  # changes can become visible later than others that have a later time
EMPTY = "{}"


@dataclass(frozen=True)
class Row:
    """A record as the database had it.

    Attributes:
        job: None where it was deleted, or cannot be used.
        generation: of the owner that has it or had it last.
        revision: higher in later ones.
    """

    id: str
    job: Job | None
    owner: str | None
    generation: int
    revision: int


class SharedRecords:
    """The records of all processes that share a database. For any thread.

    All methods raise `RecordsError` where the database does not take or give something.
    """

    def __init__(self, database: Database, owner: str, lease_s: float) -> None:
        """owner: a name of this process alone. lease_s: how long it has a video without renewal."""
        self._database, self._owner = database, owner
        self._until = database.now + lease_s
        self._seen_s = 0.0  # up to when all changes are known, by the database's clock

    def changes(self) -> list[Row]:
        """Return what has changed since the last call, and perhaps what was returned already."""
        if not self._database.has_tables():
            return []
        with self._database.reading() as connection:
            now_s = connection.scalar(sa.select(self._database.now))
            since = VIDEOS.c.changed_at >= self._seen_s - OVERLAP_S
            rows = connection.execute(sa.select(VIDEOS).where(since)).all()
        self._seen_s = now_s or 0.0
        return [_row(row) for row in rows]

    def find(self, name: str) -> Row | None:
        """Return the record of an id, or None."""
        if not self._database.has_tables():
            return None
        with self._database.reading() as connection:
            row = connection.execute(sa.select(VIDEOS).where(VIDEOS.c.id == name)).first()
        return None if row is None else _row(row)

    def add(self, job: Job) -> Row:
        """Put a job in line, which nobody has."""
        now = self._database.now
        values = {**row_of(job), "created_at": now, "changed_at": now}
        put = VIDEOS.insert().values(**values, generation=0, revision=1, progress=0)
        with self._database.writing() as connection:
            return _row(connection.execute(put.returning(*VIDEOS.c)).one())

    def claim(self) -> Row | None:
        """Take the oldest video that waits, or whose owner has not renewed its lease; else None.

        Its status is as it was left.
        """
        is_free = sa.or_(VIDEOS.c.owner.is_(None), VIDEOS.c.lease_until < self._database.now)
        is_open = VIDEOS.c.status.in_([Status.QUEUED, Status.IN_PROGRESS])
        oldest = (
            sa.select(VIDEOS.c.id)
            .where(is_open, is_free)
            .order_by(VIDEOS.c.created_at, VIDEOS.c.id)
            .limit(1)
        )
        values = {"owner": self._owner, "lease_until": self._until}
        if not self._database.has_tables():
            return None
        with self._database.reading() as connection:  # most often there is none
            if connection.execute(oldest).first() is None:
                return None
        with self._database.writing() as connection:
            name = connection.scalar(oldest.with_for_update(skip_locked=True))
            if name is None:
                return None
            generation = {"generation": VIDEOS.c.generation + 1}
            take = self._change(name, {**values, **generation})
            return _row(connection.execute(take).one())

    def renew(self, held: Mapping[str, tuple[int, Job]]) -> set[str]:
        """Renew the leases of videos, by their ids with generation and job; return those kept.

        What the jobs say of stage and progress is then known to all.
        """
        kept = set()
        with self._database.writing() as connection:
            for name, (generation, job) in sorted(held.items()):
                values = {"lease_until": self._until, "stage": job.stage, "progress": job.progress}
                change = self._change(name, values).where(*self._is_ours(generation))
                if connection.execute(change).first() is not None:
                    kept.add(name)
        return kept

    def save(self, job: Job, generation: int, is_given_up: bool, keep_s: float = 0.0) -> Row | None:
        """Write the state of a video that this process has; None where it has it no more.

        is_given_up: whether nobody has it then. keep_s: until it expires, where it has ended.
        """
        values = row_of(job)
        del values["id"], values["created_at"]
        now = self._database.now
        if job.has_ended:
            values |= {"completed_at": now, "expires_at": now + keep_s}
        if job.is_running:
            values["started_at"] = now
        values |= {"stage": job.stage, "progress": job.progress}
        free = {"owner": None, "lease_until": None}
        values |= free if is_given_up else {"lease_until": self._until}
        change = self._change(job.id, values).where(*self._is_ours(generation))
        with self._database.writing() as connection:
            row = connection.execute(change).first()
        return None if row is None else _row(row)

    def delete(self, name: str) -> bool:
        """Forget a video, whoever has it; return whether it was there."""
        values = {"status": DELETED, "request": EMPTY, "result": EMPTY}
        free = {"owner": None, "lease_until": None, "generation": VIDEOS.c.generation + 1}
        change = self._change(name, {**values, **free}).where(VIDEOS.c.status != DELETED)
        with self._database.writing() as connection:
            return connection.execute(change).first() is not None

    def expired(self) -> list[str]:
        """Return the ids of ended videos that have been kept for long enough."""
        ended = VIDEOS.c.status.in_([Status.COMPLETED, Status.FAILED])
        return self._names(ended, VIDEOS.c.expires_at <= self._database.now)

    def deleted(self, since_s: float) -> list[str]:
        """Return the ids of videos that were deleted so long ago."""
        old = VIDEOS.c.changed_at <= self._database.now - since_s
        return self._names(VIDEOS.c.status == DELETED, old)

    def purge(self, names: Iterable[str]) -> None:
        """Remove the records of deleted videos."""
        gone = VIDEOS.c.id.in_(list(names)), VIDEOS.c.status == DELETED
        with self._database.writing() as connection:
            connection.execute(VIDEOS.delete().where(*gone))

    def _names(self, *which: sa.ColumnElement[bool]) -> list[str]:
        if not self._database.has_tables():
            return []
        with self._database.reading() as connection:
            return list(connection.scalars(sa.select(VIDEOS.c.id).where(*which)))

    def _is_ours(self, generation: int) -> tuple[sa.ColumnElement[bool], ...]:
        return VIDEOS.c.owner == self._owner, VIDEOS.c.generation == generation

    def _change(self, name: str, values: Mapping[str, Any]) -> ReturningUpdate[Any]:
        noted = {"revision": VIDEOS.c.revision + 1, "changed_at": self._database.now}
        change = VIDEOS.update().where(VIDEOS.c.id == name).values({**values, **noted})
        return change.returning(*VIDEOS.c)


def _row(row: sa.Row[Any]) -> Row:
    job = None if row.status == DELETED else job_of(row._asdict())
    if job is not None and not job.has_ended:
        job.stage, job.progress = row.stage, row.progress
    return Row(row.id, job, row.owner, row.generation, row.revision)
