"""Jobs as rows, and back: what a row says is checked like a file, see `record`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from magihuman.runtime.serving import record
from magihuman.runtime.serving.record import Job
from magihuman.runtime.serving.records.database import Database
from magihuman.runtime.serving.records.tables import VIDEOS

log = logging.getLogger("magihuman")

PLAIN = ("id", "status", "created_at", "started_at", "completed_at", "expires_at", "attempts")
REQUEST = ("prompt", "options", "model")
RESULT = ("timings_s", "warnings", "error", "peak_memory_mb")


class Records:
    """What an SQLite file has of jobs, for a server that has it to itself. For any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def load(self) -> dict[str, Job | None]:
        """Return all jobs by their ids; None, with a line in the log, for a row that is none.

        Raises `RecordsError`, and `OutputError` for records of a later version.
        """
        if not self._database.has_tables():
            return {}
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(VIDEOS)).all()
        return {str(row.id): job_of(row._asdict()) for row in rows}

    def save(self, *jobs: Job) -> None:
        """Write the states of jobs, all or none. Raises `RecordsError`."""
        if not jobs:
            return
        with self._database.writing() as connection:
            connection.execute(self._put(), [row_of(job) for job in jobs])

    def remove(self, names: Iterable[str]) -> None:
        """Forget jobs. Raises `RecordsError`."""
        with self._database.writing() as connection:
            for name in names:
                connection.execute(VIDEOS.delete().where(VIDEOS.c.id == name))

    def _put(self) -> sa.Insert:
        put = sqlite.insert(VIDEOS).values(generation=0, changed_at=self._database.now)
        changed = {name: put.excluded[name] for name in (*PLAIN, "request", "result", "changed_at")}
        return put.on_conflict_do_update(index_elements=["id"], set_=changed)


def row_of(job: Job) -> dict[str, Any]:
    """Return the columns that say what a job is."""
    values = record.kept(job)
    row = {name: values[name] for name in PLAIN}
    row["request"] = json.dumps({name: values[name] for name in REQUEST})
    row["result"] = json.dumps({name: values[name] for name in RESULT})
    return row


def job_of(row: Mapping[str, Any]) -> Job | None:
    """Return the job of a row; None, with a line in the log, where it is none."""
    try:
        values = {name: row[name] for name in PLAIN}
        for name, keys in (("request", REQUEST), ("result", RESULT)):
            values |= _object(row[name], keys)
        return record.checked(values)
    except ValueError as error:
        log.warning("%.100s is left alone: its record cannot be used (%.300s)", row["id"], error)
        return None


def _object(text: object, keys: Iterable[str]) -> dict[str, Any]:
    if not isinstance(text, str) or len(text) > record.MAX_STATE_BYTES:
        raise ValueError("it must be text of a bounded length")
    values = record.parsed(text)
    if not isinstance(values, dict) or values.keys() - set(keys):
        raise ValueError(f"it must be a JSON object of {', '.join(keys)}")
    return values
