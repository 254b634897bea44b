"""Videos that several processes share by a database: each is one's at a time, and ends once."""

from __future__ import annotations

import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from video_client import until

from magihuman.runtime import InvalidRequestError, MissingExtraError, OutputError
from magihuman.runtime.serving.record import Job, Status
from magihuman.runtime.serving.records.database import Database, DatabaseAway, RecordsError
from magihuman.runtime.serving.records.leases import Row, SharedRecords

OPTIONS = {"seconds": 0.2, "width": 32, "height": 32, "seed": 7}
Process = Callable[..., SharedRecords]


@pytest.fixture
def process(database_url):
    """Makes what each process has of the records."""
    made = []

    def make(name: str = "a", lease_s: float = 60.0) -> SharedRecords:
        made.append(Database(database_url))
        return SharedRecords(made[-1], name, lease_s)

    yield make
    for database in made:
        database.close()


def added(records: SharedRecords, count: int = 1) -> list[str]:
    return [records.add(Job("hi", dict(OPTIONS))).id for _ in range(count)]


def begun(row: Row) -> Job:
    return replace(row.job, status=Status.IN_PROGRESS, attempts=row.job.attempts + 1)


def ended(row: Row, code: str = "x") -> Job:
    return replace(row.job, status=Status.FAILED, error={"code": code, "message": "y"})


def test_all_see_what_one_has_added(process):
    job = Job("a prompt \0 é \U0001f600", dict(OPTIONS), warnings=["a note"], model="nano")
    row = process("a").add(job)
    assert row.job == replace(job, created_at=row.job.created_at)
    found = process("b").find(job.id)
    assert found == row and [each.id for each in process("c").changes()] == [job.id]
    assert process("b").find("video_x") is None


def test_the_oldest_is_taken_first_and_once(process):
    a, b = process("a"), process("b")
    names = added(a, 3)
    taken = [records.claim() for records in (a, b, a)]
    assert [row.id for row in taken] == names
    assert [(row.owner, row.generation) for row in taken] == [("a", 1), ("b", 1), ("a", 1)]
    assert a.claim() is None and b.claim() is None


def test_many_at_once_take_each_once(process):
    count, workers = 24, 6
    names = added(process("first"), count)
    together = threading.Barrier(workers)

    def work(number: int) -> list[str]:
        records, taken = process(str(number)), []
        together.wait(300)
        while (row := records.claim()) is not None:
            taken.append(row.id)
        return taken

    with ThreadPoolExecutor(workers) as pool:
        found = [name for taken in pool.map(work, range(workers)) for name in taken]
    assert sorted(found) == sorted(names)


def test_a_lease_that_is_renewed_is_kept(process):
    a, b = process("a", lease_s=0.5), process("b")
    (name,) = added(a)
    row = a.claim()
    job = begun(row)
    job.stage, job.progress = "denoise", 40
    assert a.save(job, row.generation, is_given_up=False).job.started_at is not None
    end_s = time.monotonic() + 1.5
    while time.monotonic() < end_s:
        assert a.renew({name: (row.generation, job)}) in ({name}, set())
        if b.claim() is not None:  # this machine was busy for half a second
            pytest.skip("the lease could not be renewed in time")
        time.sleep(0.05)
    found = b.find(name).job
    assert (found.status, found.stage, found.progress) == (Status.IN_PROGRESS, "denoise", 40)


def test_whoever_has_lost_a_lease_changes_nothing(process):
    """Neither its end nor anything else, also where it has it again."""
    a, b = process("a", lease_s=0.05), process("b")
    (name,) = added(a)
    before = a.claim()
    a.save(begun(before), before.generation, is_given_up=False)
    taken = until(b.claim)
    assert (taken.id, taken.owner, taken.generation) == (name, "b", 2)
    assert taken.job.status is Status.IN_PROGRESS and taken.job.attempts == 1
    assert a.save(ended(before), before.generation, is_given_up=True) is None
    assert a.renew({name: (before.generation, before.job)}) == set()
    assert b.save(ended(taken, "b"), taken.generation, is_given_up=True).job.error["code"] == "b"
    for records, row in ((a, before), (b, taken)):
        assert records.save(ended(row), row.generation, is_given_up=True) is None
    assert a.find(name).job.error["code"] == "b"


def test_what_is_put_back_is_anybodys(process):
    a, b = process("a"), process("b")
    (name,) = added(a)
    row = a.claim()
    assert a.save(row.job, row.generation, is_given_up=True).owner is None
    again = b.claim()
    assert (again.id, again.generation) == (name, 2)
    assert a.save(ended(row), row.generation, is_given_up=True) is None


def test_whoever_deletes_ends_it_for_all(process):
    a, b = process("a"), process("b")
    (name,) = added(a)
    row = a.claim()
    assert b.delete(name) and not a.delete(name)
    assert a.find(name).job is None
    assert a.save(ended(row), row.generation, is_given_up=True) is None
    assert a.renew({name: (row.generation, row.job)}) == set() and b.claim() is None
    assert [each.job for each in b.changes()] == [None]
    assert b.deleted(3600) == [] and until(lambda: b.deleted(0)) == [name]
    b.purge([name])
    assert a.find(name) is None


def test_ended_ones_expire_by_the_clock_of_the_database(process):
    a = process("a")
    added(a, 2)
    for keep_s in (0.0, 100.0):
        row = a.claim()
        kept = a.save(ended(row), row.generation, is_given_up=True, keep_s=keep_s).job
        assert kept.expires_at == pytest.approx(kept.completed_at + keep_s)
        if not keep_s:
            name = row.id
    assert until(a.expired) == [name]


def test_changes_are_told_to_the_last(process):
    a, b = process("a"), process("b")
    names = added(a, 3)
    assert {row.id for row in b.changes()} == set(names)
    row = a.claim()
    a.save(ended(row), row.generation, is_given_up=True)
    assert {each.id: each.job.status for each in b.changes()}[row.id] is Status.FAILED


def test_tables_are_made_once_by_many_at_once(process):
    together = threading.Barrier(4)

    def add(number: int) -> None:
        together.wait(300)
        added(process(str(number)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    assert len(process("last").changes()) == 4


def test_tables_of_a_later_release_are_refused(tmp_path):
    url = f"sqlite:///{tmp_path}/records.sqlite"
    added(SharedRecords(Database(url), "a", 1))
    with sqlite3.connect(tmp_path / "records.sqlite") as later:
        later.execute("UPDATE magihuman_schema SET version = 99")
    with pytest.raises(OutputError, match="has version 99"):
        Database(url).check()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://me:secret@host/x", r"must be postgresql://.*, or sqlite:///FILE, got mysql://"),
        ("videos", "got what is no URL"),
        ("", "got what is no URL"),
        ("postgresql://me:secret@host:port/x", "got what is no URL"),
        ("sqlite://", "got sqlite without a file"),
        ("sqlite:///:memory:", "got sqlite without a file"),
    ],
)
def test_urls_of_no_database(url, says):
    with pytest.raises(InvalidRequestError, match=says) as refused:
        Database(url)
    assert "secret" not in str(refused.value)


def test_a_database_that_is_away(tmp_path):
    pytest.importorskip("psycopg", reason="the extra [cluster] is not installed")
    database = Database(f"postgresql://me:secret@/x?host={tmp_path}")
    with pytest.raises(DatabaseAway):
        SharedRecords(database, "a", 1).claim()
    with pytest.raises(OutputError, match="must be a database that can be read") as refused:
        database.check()
    assert "secret" not in str(refused.value)
    with pytest.raises(RecordsError):
        SharedRecords(Database("sqlite:////proc/none/x"), "a", 1).add(Job("hi", dict(OPTIONS)))


def test_what_postgresql_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r"needs psycopg.*magihuman\[cluster\]"):
        Database("postgresql://host/x")
