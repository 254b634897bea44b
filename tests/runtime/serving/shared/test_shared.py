"""Several servers that share one line by a database and a storage, one of which is lost."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import pytest
from PIL import Image
from video_client import LONG, SMALL, TOKEN, TOKEN_SHA256, left_in, until

from magihuman.runtime.serving.messages import Made, Report
from magihuman.runtime.serving.records.database import Database
from magihuman.runtime.serving.records.leases import SharedRecords
from magihuman.runtime.serving.settings import Settings, Shared
from magihuman.runtime.serving.shared.staging import staged
from magihuman.runtime.serving.storage.files import Storage

LEASE_S = 2.0


@pytest.fixture
def database_url(request, tmp_path) -> str:
    """PostgreSQL where it is installed; what either database does is tried in `test_leases`."""
    try:
        return request.getfixturevalue("postgresql_url")
    except pytest.skip.Exception:
        return f"sqlite:///{tmp_path}/records.sqlite"


@pytest.fixture
def settings(tmp_path, database_url) -> Settings:
    folder = tmp_path / "videos"
    folder.mkdir()
    shared = Shared(database_url, str(tmp_path / "storage"), LEASE_S)
    return Settings(folder, "tiny", token_sha256=TOKEN_SHA256, shared=shared)


@pytest.fixture
def server(settings, replica, serve_here, tmp_path):
    """Starts a server, each with a folder of its own. make: in place of the replica's. takes:
    whether it has any video made.
    """
    with ExitStack() as running:

        def start(make=None, takes=True):
            folder = tmp_path / f"scratch{len(started)}"
            folder.mkdir()
            own = replace(settings, folder=folder)
            made = running.enter_context(serve_here(own, replica, make))
            started.append(made)
            if not takes:
                made.run(leave_all_to_others(made.jobs[0]))
            return made

        started = []
        yield start


async def leave_all_to_others(jobs) -> None:
    jobs._own[1].cancel()


def die(local) -> None:
    """As where its process is killed: nothing more is written, and nobody is told."""

    async def stop() -> None:
        jobs = local.jobs[0]
        jobs._records = Dead()
        for task in (*jobs._own, *jobs._tasks.values()):
            task.cancel()

    local.run(stop())


class Dead:
    """Records that take nothing, and do not say so either."""

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: threading.Event().wait(0.01)


class Held:
    """Videos that an engine begins, and ends when it is told."""

    def __init__(self, replica) -> None:
        self.begun, self.let = [], threading.Event()
        self._make = partial(staged, make=replica.make)

    async def make(self, work):
        self.begun.append(work)
        yield Report("denoise", 1, 2)
        while not self.let.is_set():
            await asyncio.sleep(0.02)
        async for event in self._make(work):
            yield event


def test_whatever_one_takes_another_tells_of(server, settings, face, voice):
    a, b = server(), server(takes=False)
    with face.open("rb") as image, voice.open("rb") as sound:
        name = a.create(SMALL, input_reference=image, audio=sound)
    assert b.get(name)["id"] == name  # at once
    a.when(name, "completed")
    assert b.get(name)["status"] == "completed"
    assert b.get(name) == a.get(name)
    assert [video["id"] for video in b.http.get("/v1/videos").json()["data"]] == [name]
    content = a.content(name)
    assert content.status_code == 200 and content.content[4:8] == b"ftyp"
    assert b.content(name).content == content.content
    part = b.content(name, Range="bytes=4-7")
    assert (part.status_code, part.content) == (206, b"ftyp")
    for local in (a, b):
        for variant in ("thumbnail", "spritesheet"):
            answer = local.http.get(f"/v1/videos/{name}/content", params={"variant": variant})
            assert Image.open(io.BytesIO(answer.content)).format == "WEBP"
    storage = Storage(settings.shared.storage)
    assert storage.names(name) == {"video-1.mp4", "thumbnail.webp", "spritesheet.webp"}
    b.delete(name)
    assert a.http.get(f"/v1/videos/{name}").status_code == 404
    assert a.content(name).status_code == 404 and storage.names(name) == set()
    assert a.http.get("/v1/videos").json()["data"] == []


def test_another_cancels_what_one_makes(server, replica):
    held = Held(replica)
    a, b = server(held.make), server(takes=False)
    names = [a.create(), b.create()]
    for name in names:
        b.when(name, "in_progress")
    b.delete(names[0])
    assert a.http.get(f"/v1/videos/{names[0]}").status_code == 404
    until(lambda: names[0] not in a.jobs[0]._tasks)
    held.let.set()
    a.when(names[1], "completed")


def test_what_a_lost_one_has_is_made_by_another(server, replica):
    held = Held(replica)
    a = server(held.make)
    names = [a.create() for _ in range(3)]
    until(lambda: len(held.begun) == 2)
    die(a)
    b = server()
    for name in names:
        done = b.when(name, "completed")
        assert b.content(name).status_code == 200 and done["error"] is None
    held.let.set()


def test_what_is_lost_twice_fails(server, replica):
    name = None
    for _ in range(2):
        held = Held(replica)
        a = server(held.make)
        name = name or a.create()
        until(lambda held=held: held.begun)
        a.when(name, "in_progress")
        die(a)
    b = server()
    assert b.when(name, "failed")["error"]["code"] == "engine_lost"


def test_an_end_that_comes_too_late_is_none(server, replica, settings, monkeypatch):
    """As of a process that was stopped for a while, and goes on."""
    held = Held(replica)
    a = server(held.make)
    name = a.create()
    a.when(name, "in_progress")
    monkeypatch.setattr(a.jobs[0]._records, "renew", lambda held: held.keys())  # says so and is not
    a.run(leave_all_to_others(a.jobs[0]))
    b = server()
    done = b.when(name, "completed")
    held.let.set()
    until(lambda: name not in a.jobs[0]._tasks)
    assert a.get(name) == b.get(name) == done


def test_one_that_stops_leaves_what_it_has_to_others(server, replica):
    held = Held(replica)
    a = server(held.make)
    running, waiting = a.create(), [a.create(LONG) for _ in range(3)]
    a.when(running, "in_progress")
    a.run(a.jobs[0].close())
    b = server()
    b.when(running, "completed")
    for name in waiting:
        b.delete(name)
    held.let.set()


def test_a_restart_finds_all(server, settings):
    a = server()
    done = a.create()
    a.when(done, "completed")
    content = a.content(done).content
    a.run(a.jobs[0].close())
    b = server()
    until(lambda: b.http.get("/v1/videos").json()["data"])
    assert b.content(done).content == content
    assert left_in(settings.folder) == []


def test_a_database_that_is_away_costs_an_answer_and_no_video(server, monkeypatch):
    from magihuman.runtime.serving.records import database

    a = server()
    done = a.create()
    a.when(done, "completed")
    begun = database.Database._begun

    def away(self):
        raise database.DatabaseAway(5, "the connection to 10.0.0.1 was refused")

    with monkeypatch.context() as patch:
        patch.setattr(database.Database, "_begun", away)
        refused = a.post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "database")
        assert "10.0.0.1" not in refused.text and "retry-after" in refused.headers
        assert a.http.delete(f"/v1/videos/{done}").status_code == 503
    assert begun is database.Database._begun
    a.when(a.create(), "completed")
    a.delete(done)


def test_an_end_is_told_once_the_database_has_it(server, replica, monkeypatch):
    held = Held(replica)
    a = server(held.make)
    name = a.create()
    a.when(name, "in_progress")
    from magihuman.runtime.serving.records import database

    tried = threading.Event()

    def away(self, *args, **kwargs):
        tried.set()
        raise database.DatabaseAway(5, "away")

    with monkeypatch.context() as patch:
        patch.setattr(SharedRecords, "save", away)
        held.let.set()
        until(tried.is_set)
        assert a.get(name)["status"] == "in_progress"
    a.when(name, "completed")


def test_kept_ones_expire(settings, serve_here, replica, monkeypatch):
    monkeypatch.setattr("magihuman.runtime.serving.shared.jobs.SWEEP_S", 0.05)
    brief = replace(settings, keep_s=0.5)
    with serve_here(brief, replica) as local:
        name = local.create()
        until(lambda: local.http.get(f"/v1/videos/{name}").status_code == 404)
    assert Storage(settings.shared.storage).names(name) == set()


def test_the_live_stream_is_refused_where_it_is_not_had(server):
    a = server(takes=False)
    name = a.create()
    for answer in (
        a.http.get(f"/v1/videos/{name}/stream"),
        a.http.head(f"/v1/videos/{name}/stream"),
    ):
        assert answer.status_code == 409


def test_sync_by_one_made_by_another(server, replica):
    held = Held(replica)
    held.let.set()
    a = server(takes=False)
    server(held.make)
    form = {key: (None, value) for key, value in SMALL.items()}
    for _ in range(2):
        answer = a.http.post("/v1/videos/sync", files=form, timeout=120)
        assert answer.status_code == 200 and answer.content[4:8] == b"ftyp"


@contextmanager
def storage_away(monkeypatch):
    def away(self, *args):
        from magihuman.runtime.serving.storage.files import StorageError

        raise StorageError(5, "bucket of somebody: refused")

    with monkeypatch.context() as patch:
        for method in ("put", "size", "names"):
            patch.setattr(Storage, method, away)
        patch.setattr("magihuman.runtime.serving.shared.staging.PAUSE_S", 0.01)
        yield


def test_a_storage_that_is_away(server, replica, face, monkeypatch):
    a = server()
    done = a.create()
    a.when(done, "completed")
    with storage_away(monkeypatch):
        with face.open("rb") as image:
            refused = a.post(SMALL, input_reference=image)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage")
        assert a.content(done).status_code == 503
        failed = a.when(a.create(), "failed")
        assert failed["error"]["code"] == "storage" and "somebody" not in str(failed)
    assert a.content(done).status_code == 200


def test_what_an_engine_makes_goes_to_the_storage(replica, storage_url, tmp_path):
    """And nothing stays on the engine's machine."""
    import tempfile
    from pathlib import Path

    from magihuman.runtime.request import Request
    from magihuman.runtime.serving.messages import Stays, Work

    storage = Storage(storage_url)
    storage.check()
    request = Request("hi", seconds=0.2, width=32, height=32, steps=1)
    before = set(Path(tempfile.gettempdir()).glob("magihuman-*"))
    stays = Stays(storage_url, "video_1", "video_1/video-3.mp4")
    work = Work(request, Path("video_1/video.mp4"), None, stays=stays)

    async def make():
        return [event async for event in staged(work, replica.make)]

    events = asyncio.run(make())
    assert isinstance(events[-1], Made)
    assert storage.read("video_1/video-3.mp4", 4, 8) == b"ftyp"
    assert storage.names("video_1") == {"video-3.mp4"}
    assert set(Path(tempfile.gettempdir()).glob("magihuman-*")) <= before


def test_videos_of_many_servers_end_once(server, settings, replica, tmp_path):
    """Whatever is taken, lost and taken again."""
    held = Held(replica)
    held.let.set()
    running = [server(held.make) for _ in range(2)]
    names = [running[number % 2].create({**SMALL, "seed": str(number)}) for number in range(6)]
    until(lambda: any(running[0].get(name)["status"] == "in_progress" for name in names))
    die(running[0])
    running.append(server(held.make))
    ends = {name: running[2].when(name, "completed") for name in names}
    database = Database(settings.shared.database)
    rows = {row.id: row for row in SharedRecords(database, "test", 1).changes()}
    database.close()
    assert rows.keys() == ends.keys()
    storage = Storage(settings.shared.storage)
    for name, row in rows.items():
        assert row.job.status == "completed"
        assert f"video-{row.generation}.mp4" in storage.names(name)
        assert running[1].content(name).status_code == 200


def test_nobody_talks_to_a_face_that_is_shared(server, face):
    """The voice would have to reach the one machine where the engine is."""
    connect = pytest.importorskip("websockets.sync.client").connect
    a = server(takes=False)
    picture = "data:image/png;base64," + base64.b64encode(face.read_bytes()).decode()
    asked = {"image": picture, "token": TOKEN, "sample_rate": 16000, "size": "64x64"}
    with connect(f"ws{a.url.removeprefix('http')}/v1/live", proxy=None, open_timeout=300) as client:
        client.send(json.dumps(asked))
        answer = json.loads(client.recv(timeout=300))
    assert (answer["type"], answer["error"]["code"]) == ("error", "not_live"), answer
