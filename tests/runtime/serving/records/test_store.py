from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress

import numpy as np
import pytest

from magihuman.runtime import InvalidRequestError, OutputError
from magihuman.runtime.media import write_mp4
from magihuman.runtime.serving import record
from magihuman.runtime.serving.records.database import FILE, Database, RecordsError
from magihuman.runtime.serving.store import MAX_ATTEMPTS, STATE, Job, Status, Store, locked

OPTIONS = {"seconds": 0.2, "width": 32, "height": 32, "seed": 7}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "videos", keep_s=100)


def added(store: Store, **uploads: bytes) -> Job:
    job = Job("hi", dict(OPTIONS))
    with store.create(job) as folder:
        for name, content in uploads.items():
            (folder / name).write_bytes(content)
    store.jobs[job.id] = job
    return job


def again(store: Store) -> Store:
    """As a restart finds it."""
    return Store(store._folder, keep_s=100)


def files(store: Store) -> set[str]:
    """All but the records."""
    found = {str(p.relative_to(store._folder)) for p in store._folder.rglob("*") if p.is_file()}
    return {name for name in found if not name.startswith(FILE)}


def left_by_an_earlier_release(store: Store, job: Job, content: str | None = None) -> None:
    """A job whose state lies in its folder, and in no database."""
    place = store._folder / job.id
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    (place / STATE).write_text(json.dumps(record.kept(job)) if content is None else content)
    store._records.remove([job.id])


def test_a_job_is_found_as_it_was(store):
    job = added(store, image=b"1", audio=b"2")
    (restored,) = again(store).jobs.values()
    assert restored == job and restored is not job
    request = again(store).request(restored)
    assert (request.prompt, request.seed, request.seconds) == ("hi", 7, 0.2)
    assert (request.image.read_bytes(), request.audio.read_bytes()) == (b"1", b"2")


def test_the_folder_is_for_nobody_else(store):
    assert store._folder.stat().st_mode & 0o077 == 0


def open_to_others(store: Store) -> set[str]:
    """What somebody else may read, by name; without links."""
    paths = [store._folder, *store._folder.rglob("*")]
    return {p.name for p in paths if p.lstat().st_mode & 0o077 and not p.is_symlink()}


def test_nothing_in_the_folder_is_for_anybody_else(store):
    job = added(store, image=b"1", audio=b"2")
    store.begin(job)
    assert open_to_others(store) == set() and len(files(store)) == 2
    frames, sound = np.zeros((5, 32, 32, 3), np.uint8), np.zeros((9600, 2), np.float32)
    write_mp4(store.video(job), frames, sound, 25, 48000)
    store.complete(job, {}, ())
    assert open_to_others(store) == set()
    assert files(store) == {f"{job.id}/video.mp4"}


def test_what_was_open_to_others_is_closed(store, tmp_path):
    """As of a backup, or of a folder that was made by hand; links are not followed."""
    job, other = added(store, image=b"1"), tmp_path / "other"
    other.mkdir()
    (other / "mine").write_text("x")
    (store._folder / "video_link").symlink_to(other)
    (store._folder / job.id / "link").symlink_to(other / "mine")
    for place in (store._folder, *store._folder.rglob("*"), other, other / "mine"):
        place.chmod(0o755)
    found = again(store)
    assert job.id in found.jobs and open_to_others(found) == set()
    assert {stat.S_IMODE(p.stat().st_mode) for p in (other, other / "mine")} == {0o755}


def test_a_folder_of_others_stays_theirs(store, caplog):
    job = added(store)
    (store._folder / "holidays.mp4").touch()
    for place in (store._folder, store._folder / job.id):
        place.chmod(0o755)
    assert open_to_others(again(store)) == {"videos", "holidays.mp4"}
    assert "give the server a folder of its own" in caplog.text


def test_a_job_that_cannot_be_filled_leaves_nothing(store):
    def fill(folder) -> None:
        (folder / "image").write_bytes(b"1")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), store.create(Job("hi", {})) as folder:
        fill(folder)
    assert files(store) == set() and list(store._folder.glob("video_*")) == []
    assert again(store).jobs == {}


def test_what_a_kill_left_behind_is_removed(store):
    job = added(store)
    (store._folder / job.id / "image").write_bytes(b"1")
    for name in (".magihuman-1234", f".removed-{job.id}"):
        (store._folder / name).mkdir()
        (store._folder / name / "image").write_bytes(b"1")
    again(store)
    assert files(store) == {f"{job.id}/image"}


def test_a_record_without_a_folder_is_of_a_removed_job(store):
    """As where a server is killed between the two."""
    job, other = added(store), added(store)
    (store._folder / job.id).rename(store._folder / f".removed-{job.id}")
    assert list(again(store).jobs) == [other.id]
    (store._folder / job.id).mkdir()
    assert list(again(store).jobs) == [other.id]


def test_finished_ones_keep_their_video_and_lose_their_uploads(store):
    job = added(store, image=b"1", audio=b"2")
    store.begin(job)
    store.video(job).write_bytes(b"mp4")
    store.complete(job, {"text": 0.5}, ("a note",))
    assert files(store) == {f"{job.id}/video.mp4"}
    (restored,) = again(store).jobs.values()
    assert restored.status is Status.COMPLETED and restored.progress == 100
    assert (restored.timings_s, restored.warnings) == ({"text": 0.5}, ["a note"])
    assert restored.expires_at == restored.completed_at + 100


def test_waiting_ones_keep_their_order(store):
    jobs = [added(store) for _ in range(5)]
    jobs[2].created_at -= 1000
    store._save(jobs[2])
    ids = [job.id for job in again(store).queued()]
    assert ids == [jobs[i].id for i in (2, 0, 1, 3, 4)]


def test_an_interrupted_one_is_queued_again_and_then_fails(store):
    job = added(store)
    for _ in range(MAX_ATTEMPTS - 1):
        store.begin(job)
        store = again(store)
        (job,) = store.queued()
    store.begin(job)
    (job,) = again(store).jobs.values()
    assert job.status is Status.FAILED and job.error["code"] == "engine_lost"
    assert again(store).queued() == []


def test_what_the_server_itself_gave_up_does_not_count(store):
    job = added(store)
    for _ in range(2 * MAX_ATTEMPTS):
        store.begin(job)
        store.back_in_line(job, is_its_fault=False)
    assert (job.status, job.attempts) == (Status.QUEUED, 0)


def test_a_video_whose_server_died_before_it_could_say_so_is_completed(store):
    job = added(store)
    store.begin(job)
    store.video(job).write_bytes(b"whole")  # a rename put it there
    (restored,) = again(store).jobs.values()
    assert restored.status is Status.COMPLETED


def test_a_video_that_was_taken_away_has_failed(store):
    job = added(store)
    store.begin(job)
    store.video(job).write_bytes(b"mp4")
    store.complete(job, {}, ())
    store.video(job).unlink()
    (restored,) = again(store).jobs.values()
    assert (restored.status, restored.error["code"]) == (Status.FAILED, "lost")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"status": "mad"}', '{"id": "x"}'])
def test_a_state_that_cannot_be_read_stops_nobody(store, content, caplog):
    job, other = added(store), added(store)
    left_by_an_earlier_release(store, job, content)
    assert list(again(store).jobs) == [other.id]
    assert "is left alone" in caplog.text and f"{job.id}/job.json" in files(store)


def test_what_an_earlier_release_has_left_is_taken_over(store):
    """Once, and by the records from then on."""
    jobs = [added(store, image=b"1") for _ in range(3)]
    store.begin(jobs[0])
    store.video(jobs[0]).write_bytes(b"mp4")
    store.complete(jobs[0], {"text": 0.5}, ("a note",))
    for job in jobs:
        left_by_an_earlier_release(store, job)
    found = again(store)
    assert found.jobs == store.jobs and not any(STATE in name for name in files(store))
    (store._folder / jobs[1].id / STATE).write_text("{}")
    assert again(store).jobs == store.jobs


def test_thousands_of_an_earlier_release_are_one_transaction(store, monkeypatch):
    """Each takes the disk as long as a hundred rows."""
    for _ in range(20):
        job = added(store)
        store.fail(job, "x", "y")
        left_by_an_earlier_release(store, job)
    begun, begin = [], Database._begun
    monkeypatch.setattr(Database, "_begun", lambda self: begun.append(self) or begin(self))
    found = again(store)
    assert found.jobs == store.jobs and len(begun) == 1
    assert found._unsaved == set() and files(store) == set()


def test_what_an_earlier_release_has_left_is_served_from_a_full_disk(disk):
    store = Store(disk.place / "videos", keep_s=100)
    jobs = [added(store) for _ in range(3)]
    for job in jobs:
        left_by_an_earlier_release(store, job)
    (store._folder / FILE).unlink()
    disk.fill()
    found = again(store)
    assert found.jobs == store.jobs
    found.sweep()
    disk.free()
    found.sweep()
    assert files(store) == set() and again(store).jobs == store.jobs


def test_records_of_a_later_release_are_refused(store):
    added(store)
    with sqlite3.connect(store._folder / FILE) as later:
        later.execute("UPDATE magihuman_schema SET version = 99")
    with pytest.raises(OutputError, match=r"must be of version 1 at most, and .* has version 99"):
        again(store)


def test_damaged_records_are_refused(store):
    added(store)
    (store._folder / FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(RecordsError, match="file is not a database"):
        again(store)


def test_a_full_disk_loses_nothing(store, monkeypatch):
    ready, failed = (added(store, image=b"1") for _ in range(2))
    for job in (ready, failed):
        store.begin(job)
    store.video(ready).write_bytes(b"whole")

    def full(records, *jobs):
        raise RecordsError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("magihuman.runtime.serving.records.records.Records.save", full)
        store.complete(ready, {}, ())
        store.fail(failed, "disk", "the disk is full")
        assert (ready.status, failed.status) == (Status.COMPLETED, Status.FAILED)
        assert again(store).jobs[ready.id].status is Status.COMPLETED  # it starts all the same
    (waiting,) = again(store).queued()
    assert waiting.id == failed.id and again(store).request(waiting).image.read_bytes() == b"1"


def test_states_that_a_full_disk_has_refused_are_written_later(disk):
    store = Store(disk.place / "videos", keep_s=100)
    jobs = [added(store, image=b"1") for _ in range(3)]
    disk.fill()
    failed, begun, gone = jobs
    for job in jobs:
        store.begin(job)
    store.fail(failed, "disk", "the disk is full")
    store.back_in_line(begun, is_its_fault=True)
    store.sweep()
    assert again(store).jobs[failed.id].status is Status.QUEUED  # as the disk has it
    store.remove(gone)  # takes no room
    disk.free()
    store.sweep()
    found = again(store).jobs
    assert found == {failed.id: failed, begun.id: begun}
    assert f"{failed.id}/image" not in files(store) and f"{begun.id}/image" in files(store)
    store._records.remove(store.jobs)
    store.sweep()  # what has been written is not written again
    assert store._records.load() == {}


def test_a_job_is_gone_only_where_the_disk_takes_it(disk):
    store = Store(disk.place / "videos", keep_s=100)
    job, expired, late = (added(store) for _ in range(3))
    for each in (expired, late):
        store.fail(each, "x", "y")
    expired.expires_at = 0.0
    disk.refuse(True)
    with pytest.raises(OSError, match="Read-only"):
        store.remove(job)
    store.sweep()
    assert set(store.jobs) == set(again(store).jobs) == {job.id, expired.id, late.id}
    disk.refuse(False)
    store.sweep()
    store.remove(job)
    assert set(store.jobs) == set(again(store).jobs) == set(store._records.load()) == {late.id}


def test_uploads_that_cannot_be_removed_do_not_change_the_end(disk):
    store = Store(disk.place / "videos", keep_s=100)
    job = added(store, image=b"1")
    store.begin(job)
    store.video(job).write_bytes(b"mp4")
    disk.refuse(True)
    store.complete(job, {"text": 0.5}, ())
    assert job.status is Status.COMPLETED
    disk.refuse(False)
    store.sweep()
    assert again(store).jobs == {job.id: job}
    assert files(store) == {f"{job.id}/video.mp4"}


def test_what_happens_to_a_removed_job_is_not_written(store):
    job, other = added(store), added(store)
    store.remove(job)
    for _ in range(2):
        store.begin(job)
        store.fail(job, "x", "y")
        store.sweep()
    assert list(again(store).jobs) == [other.id] == list(store.jobs)


def test_a_state_under_another_name_is_left_alone(store):
    job = added(store)
    (store._folder / job.id).rename(store._folder / "video_other")
    assert again(store).jobs == {}


def test_expiry(store):
    jobs = [added(store) for _ in range(3)]
    for job in jobs[:2]:
        store.fail(job, "x", "y")
    jobs[0].expires_at = time.time() - 1
    store.expire()
    assert set(store.jobs) == set(again(store).jobs) == {jobs[1].id, jobs[2].id}


def set_clock(monkeypatch, by_s: float) -> None:
    """As the administrator or a time server does; what is asked for elapsed time is not touched."""
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + by_s)


@pytest.mark.parametrize("by_s", [1e6, -1e6, 60.0, -60.0])
def test_a_clock_that_is_set_neither_expires_nor_keeps(store, monkeypatch, by_s):
    before, after = added(store), added(store)
    store.fail(before, "x", "y")
    set_clock(monkeypatch, by_s)
    store.fail(after, "x", "y")  # between two sweeps
    store.expire()
    assert set(store.jobs) == {before.id, after.id}
    for job in (before, after):  # of the hundred seconds that it is kept
        assert 50 < job.expires_at - time.time() <= 100
        assert again(store).jobs[job.id].expires_at == job.expires_at


def test_a_clock_that_was_ahead_before_a_restart_keeps_nothing_for_ever(store, monkeypatch):
    with monkeypatch.context() as patch:
        set_clock(patch, 1e8)
        ahead = again(store)
        job = added(ahead)
        ahead.fail(job, "x", "y")
    found = again(store).jobs[job.id]
    assert 50 < found.expires_at - time.time() <= 100
    assert again(store).jobs[job.id].expires_at == found.expires_at


def test_removal_while_a_file_is_being_written(store):
    job = added(store)
    with (store._folder / job.id / ".magihuman-x.mp4").open("wb") as file:
        store.remove(job)
        file.write(b"still")
    assert files(store) == set() and store.jobs == {}


def test_two_servers_cannot_share_a_folder(tmp_path):
    folder = tmp_path / "a" / "videos"
    refused = pytest.raises(OutputError, match="of one server alone")
    with locked(folder, 0), refused, locked(folder, 0.1):
        pass
    with locked(folder, 0):
        pass


def test_a_server_waits_for_the_one_before(tmp_path):
    script = "import sys, time; from pathlib import Path\n"
    script += "from magihuman.runtime.serving.store import locked\n"
    script += "with locked(Path(sys.argv[1]), 0): print('has it', flush=True); time.sleep(60)\n"
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"has it\n"
        threading.Timer(0.3, other.kill).start()
        with locked(tmp_path, 60):
            assert other.wait(300) == -signal.SIGKILL


@pytest.mark.parametrize("is_nfs", [False, True])
def test_the_lock_follows_no_link(tmp_path, monkeypatch, is_nfs):
    """Nor does it change what is there. NFS locks no folder, and cannot be mounted here."""
    target, folder, flock = tmp_path / "target", tmp_path / "videos", fcntl.flock

    def of_nfs(number, how) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(number, how)

    if is_nfs:
        monkeypatch.setattr(fcntl, "flock", of_nfs)
    target.write_text("mine")
    folder.mkdir()
    (folder / ".lock").symlink_to(target)
    outcome = pytest.raises(OutputError, match="symbolic links") if is_nfs else nullcontext()
    with outcome, locked(folder, 0):
        pass
    (folder / ".lock").unlink()
    (folder / ".lock").write_text("kept")
    with locked(folder, 0), pytest.raises(OutputError, match="alone"), locked(folder, 0):
        pass
    assert (target.read_text(), (folder / ".lock").read_text()) == ("mine", "kept")


def test_a_disk_that_takes_nothing_can_be_read(disk):
    """A folder is locked and found where not even a name can be written."""
    store = Store(disk.place / "videos", keep_s=100)
    jobs = [added(store) for _ in range(2)]
    store.begin(jobs[0])
    store.video(jobs[0]).write_bytes(b"mp4")
    store.complete(jobs[0], {}, ())
    disk.refuse(True)
    with locked(store._folder, 0):
        found = again(store)
        assert found.jobs == store.jobs and found.video(jobs[0]).read_bytes() == b"mp4"


def test_what_a_dead_engine_has_half_written_is_removed(store):
    job, other = added(store), added(store)
    for each in (job, other):
        store.begin(each)
        (store._folder / each.id / ".magihuman-0123.mp4").write_bytes(b"half")
    store.back_in_line(job, is_its_fault=True)
    assert f"{job.id}/.magihuman-0123.mp4" not in files(store)
    again(store)
    assert files(store) == set()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "x"
    with pytest.raises(OutputError, match="cannot be written to"), locked(place, 0):
        pass


def test_a_request_that_is_none_says_so(store):
    with pytest.raises(InvalidRequestError, match="seconds must be"):
        store.request(Job("hi", {"seconds": 0}))


@pytest.mark.parametrize("seed", range(8))
def test_whatever_a_disk_refuses_nothing_is_lost_and_nothing_comes_back(disk, seed):
    """Of jobs that were taken, ended and removed while the disk filled, refused and was well."""
    draw = random.Random(seed)
    place = disk.place / "videos"
    store, taken, state = Store(place, 1e6), dict[str, Job](), "well"
    for _ in range(120):
        job = draw.choice(list(taken.values())) if taken else None
        match draw.choice(
            ["create", "create", "begin", "fail", "remove", "sweep", "disk", "start"]
        ):
            case "create":
                with suppress(OSError):
                    new = added(store, image=b"1")
                    taken[new.id] = new
            case "begin" if job and job.status is Status.QUEUED:
                store.begin(job)
            case "fail" if job and job.is_running:
                store.fail(job, "x", "y")
            case "remove" if job:
                with suppress(OSError):
                    store.remove(job)
                    del taken[job.id]
            case "sweep":
                store.sweep()
            case "disk":
                state = changed(disk, state, draw.choice(["well", "full", "refusing"]))
            case "start":
                state = changed(disk, state, "well")
                store.sweep()
                ended = {name for name, job in taken.items() if job.has_ended}
                store = Store(place, 1e6)
                assert store.jobs.keys() == taken.keys()
                assert ended <= {name for name, job in store.jobs.items() if job.has_ended}
                taken = dict(store.jobs)
    changed(disk, state, "well")
    assert Store(place, 1e6).jobs.keys() == taken.keys()


def changed(disk, before: str, after: str) -> str:
    if before == "refusing":
        disk.refuse(False)
    if before == "full":
        disk.free()
    if after == "full":
        disk.fill()
    if after == "refusing":
        disk.refuse(True)
    return after


WRITER = """
import sys
from pathlib import Path
from magihuman.runtime.serving.store import Job, Store
store = Store(Path(sys.argv[1]), 100)
while True:
    job = Job("hi", {"seconds": 0.2})
    with store.create(job) as folder:
        (folder / "image").write_bytes(b"1" * 1000)
    store.jobs[job.id] = job
    store.begin(job)
    store.video(job).write_bytes(b"mp4")
    store.complete(job, {}, ())
    print(job.id, flush=True)
    gone = Job("hi", {"seconds": 0.2})
    with store.create(gone) as folder:
        (folder / "image").write_bytes(b"1" * 1000)
    store.jobs[gone.id] = gone
    store.remove(gone)
    print("-" + gone.id, flush=True)
"""


def test_killed_at_any_moment_no_finished_job_is_lost(tmp_path):
    finished: list[str] = []
    for round_s in (0.3, 0.1, 0.02):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            finished.append(writer.stdout.readline().strip())
            time.sleep(round_s)
            os.kill(writer.pid, signal.SIGKILL)
            said = writer.stdout.read()
        finished += [line for line in said.split("\n")[:-1] if line]  # the last may be half a line
        jobs = Store(tmp_path, 100).jobs
        kept = [name for name in finished if name[0] != "-"]
        assert {jobs[name].status for name in kept} == {Status.COMPLETED}
        assert not {f"-{name}" for name in jobs} & set(finished)  # nothing that was removed is back
        assert {place.name for place in tmp_path.glob("video_*")} == jobs.keys()
    assert len(finished) >= 3


# -- many of them ---------------------------------------------------------------------------------

READS: list[str] = []  # of files below the folder that is counted in
COUNTED: list[str] = []


@pytest.fixture(scope="module")
def counting():
    """Note every file that is opened below a folder of `COUNTED`, and every folder that is read."""

    def note(event: str, arguments: tuple) -> None:
        if COUNTED and event in ("open", "os.listdir", "os.scandir"):
            path = os.fspath(arguments[0]) if isinstance(arguments[0], (str, os.PathLike)) else ""
            if path.startswith(COUNTED[0]):
                READS.append(os.path.basename(path))

    sys.addaudithook(note)  # for good, and idle but for this module
    yield READS
    COUNTED.clear()


def test_a_restart_reads_each_finished_one_once(store, counting):
    """Its state and no more, and writes nothing, so that thousands hold no start up."""
    jobs = [added(store) for _ in range(20)]
    for job in jobs:
        store.begin(job)
        store.video(job).write_bytes(b"mp4")
        store.complete(job, {"text": 0.5}, ())
    counting.clear()
    COUNTED.append(str(store._folder) + os.sep)
    found = again(store)
    reads = sorted(counting)
    assert len(found.jobs) == 20
    assert all(name.startswith("video_") for name in reads)  # SQLite's own are not counted
    assert len(reads) <= 20 + 2 * 20  # and each folder at most twice: once for its modes
    counting.clear()
    asked = found.jobs.values()
    assert {job.status for job in asked} == {Status.COMPLETED} and counting == []
