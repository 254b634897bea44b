"""A video seen while it is made, over real HTTP: its fragments and its events."""

from __future__ import annotations

import io
import json
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import islice, pairwise
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
from connections import asking
from video_client import BEARER, LONG, SMALL, TOKEN_SHA256, until

from magihuman.runtime.files import close_to_others
from magihuman.runtime.media import check_output
from magihuman.runtime.serving.live import events, watching
from magihuman.runtime.serving.live.stream import media_type
from magihuman.runtime.serving.messages import EngineLost, Made, Report, Window
from magihuman.runtime.serving.records.database import FILE
from magihuman.runtime.serving.settings import Settings
from magihuman.runtime.serving.transfer import download

WINDOWS = {**SMALL, "seconds": "3"}
FRAMES = (25, 53, 73)  # that are decoded after each window


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(tmp_path / "videos", "tiny", token_sha256=TOKEN_SHA256)


def stream_of(name: str) -> str:
    return f"/v1/videos/{name}/stream"


def frames_of(content: bytes) -> np.ndarray:
    with av.open(io.BytesIO(content)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def fragments(content: bytes) -> int:
    """How many are there whole."""
    count = begin = 0
    while begin + 8 <= len(content):
        size = int.from_bytes(content[begin : begin + 4], "big")
        count += content[begin + 4 : begin + 8] == b"mdat" and begin + size <= len(content)
        begin += size
    return count


class Watcher:
    """A client that reads a stream in a thread of its own."""

    def __init__(self, local, name: str) -> None:
        self.content, self.status, self.is_over = b"", None, threading.Event()
        self._url, self._thread = local.url + stream_of(name), threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with httpx.stream("GET", self._url, headers=BEARER, timeout=120) as answer:
            self.status = answer.status_code
            for piece in answer.iter_raw():
                self.content += piece
        self.is_over.set()

    def has(self, count: int) -> None:
        """Return once it has so many fragments."""
        until(lambda: fragments(self.content) >= count)
        assert fragments(self.content) == count

    def end(self) -> bytes:
        self._thread.join(120)
        assert self.is_over.is_set()
        return self.content


# -- the stream -------------------------------------------------------------------------------


def test_the_first_bytes_leave_before_the_second_window_is_decoded(local, held):
    name = local.create(WINDOWS)
    watchers = [Watcher(local, name) for _ in range(3)]
    for watcher in watchers:
        watcher.has(1)
    assert held.decoded == 1 and local.get(name)["status"] == "in_progress"
    assert len(frames_of(watchers[0].content)) == FRAMES[0]
    held.let.release()
    for watcher in watchers:
        watcher.has(2)
    assert held.decoded == 2
    late = Watcher(local, name)  # who begins at the beginning
    late.has(2)
    held.let.release()
    contents = {watcher.end() for watcher in (*watchers, late)}
    local.when(name, "completed")
    after = local.http.get(stream_of(name))
    (content,) = contents | {after.content}
    assert [len(frames_of(content)), fragments(content)] == [FRAMES[-1], 3]
    pictures = (frames_of(file).ravel() for file in (content, local.content(name).content))
    assert np.corrcoef(*pictures)[0, 1] > 0.9  # of noise, which loses much on the way


def test_what_is_said_of_a_stream(local):
    name = local.create()
    local.when(name, "completed")
    answer = local.http.get(stream_of(name), headers={"Range": "bytes=5-9"})
    assert answer.status_code == 200 and len(frames_of(answer.content)) == 5  # all of it
    assert answer.headers["accept-ranges"] == "none"
    assert answer.headers["cache-control"] == "no-store"
    kind = answer.headers["content-type"]
    assert kind == media_type(answer.content)
    assert kind.startswith('video/mp4; codecs="avc1.') and kind.endswith(', mp4a.40.2"')
    with av.open(io.BytesIO(answer.content)) as container:
        profile = container.streams.video[0].codec_context.extradata[1]
    assert int(kind[len('video/mp4; codecs="avc1.') :][:2], 16) == profile
    head = local.http.head(stream_of(name))
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == "video/mp4"
    assert head.headers["accept-ranges"] == "none"


def test_streams_need_the_token_and_a_video(local):
    name = local.create()
    for kind in ("stream", "events"):
        for ask in (httpx.get, httpx.head) if kind == "stream" else (httpx.get,):
            assert ask(f"{local.url}/v1/videos/{name}/{kind}").status_code == 401
            assert ask(f"{local.url}/v1/videos/no/{kind}", headers=BEARER).status_code == 404
    assert media_type(b"") == media_type(b"avcC") == "video/mp4"


def test_a_video_that_fails_ends_its_stream(settings, replica, serve_here):
    go_on = threading.Event()

    async def make(work):
        async for event in replica.make(work):
            if isinstance(event, Made):
                while not go_on.is_set():
                    await watching.asyncio.sleep(0.01)
                raise RuntimeError
            yield event

    with serve_here(settings, replica, make) as local:
        name = local.create()
        watcher = Watcher(local, name)
        watcher.has(1)
        assert (settings.folder / name / "live.mp4").stat().st_mode & 0o777 == 0o600
        go_on.set()
        assert len(frames_of(watcher.end())) == 5
        local.when(name, "failed")
        answer = local.http.get(stream_of(name))
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_live")
        assert "has failed: something went wrong" in answer.json()["error"]["message"]
        assert local.http.head(stream_of(name)).status_code == 409
        assert not (settings.folder / name / "live.mp4").exists()


def test_a_video_that_fails_before_its_first_window(local, replica, monkeypatch):
    def fail(latent):
        raise MemoryError

    monkeypatch.setattr(replica._engine._parts.turbo_vae, "windows", fail)
    name = local.create()
    assert local.http.get(stream_of(name), timeout=120).status_code == 409
    local.when(name, "failed")


def test_a_video_that_is_removed_ends_its_stream(local, held):
    name, waiting = local.create(WINDOWS), local.create(WINDOWS)
    watcher = Watcher(local, name)
    watcher.has(1)
    other = Watcher(local, waiting)
    local.delete(waiting)
    assert other.end() and other.status == 404
    local.delete(name)
    assert len(frames_of(watcher.end())) == FRAMES[0]
    assert local.http.get(stream_of(name)).status_code == 404
    held.let.release(3)


def test_another_attempt_is_another_stream(settings, replica, serve_here):
    lost = threading.Event()

    async def make(work):
        async for event in replica.make(work):
            yield event
            if isinstance(event, Window) and not lost.is_set():
                while fragments(watcher.content) < 1:
                    await watching.asyncio.sleep(0.01)
                lost.set()
                raise EngineLost("killed")

    with serve_here(settings, replica, make) as local:
        name = local.create(WINDOWS)
        watcher = Watcher(local, name)
        assert len(frames_of(watcher.end())) == FRAMES[0]
        local.when(name, "completed")
        assert len(frames_of(local.http.get(stream_of(name)).content)) == FRAMES[-1]


@pytest.mark.parametrize("broken", ["disk", "room", "missing"])
def test_a_stream_that_cannot_be_kept_costs_no_video(local, settings, monkeypatch, broken):
    if broken == "room":  # of which there is enough for the video alone
        size = shutil.disk_usage(settings.folder)

        def check(*arguments) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(shutil, "disk_usage", lambda _: size._replace(free=2**20))
                check_output(*arguments)

        monkeypatch.setattr("magihuman.runtime.serving.replica.check_output", check)
    if broken == "disk":
        module = "magihuman.runtime.media.fragments.writer.FragmentWriter._write"

        def full(self, content) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module, full)
    name = local.create()
    local.when(name, "completed")
    (settings.folder / name / "live.mp4").unlink(missing_ok=broken != "missing")
    assert local.content(name).status_code == 200
    for answer in (local.http.get(stream_of(name)), local.http.head(stream_of(name))):
        assert answer.status_code == 409


def test_a_restart_finds_the_stream(settings, replica, serve_here, tmp_path):
    with serve_here(settings, replica) as local:
        name = local.create()
        local.when(name, "completed")
        content = local.http.get(stream_of(name)).content
    half = shutil.copytree(settings.folder, tmp_path / "half")
    with sqlite3.connect(half / FILE) as records:
        records.execute("UPDATE magihuman_videos SET status = 'in_progress'")
    with serve_here(settings, replica) as local:
        assert local.http.get(stream_of(name)).content == content
    # Killed when the video was whole, and what can be seen of it perhaps not yet.
    with serve_here(Settings(half, "tiny", token_sha256=TOKEN_SHA256), replica) as local:
        local.when(name, "completed")
        assert local.http.get(stream_of(name)).status_code == 409


def test_a_link_in_place_of_a_stream_is_not_followed(settings, replica, serve_here, tmp_path):
    with serve_here(settings, replica) as local:
        name = local.create()
        local.when(name, "completed")
    path = settings.folder / name / "live.mp4"
    path.unlink()
    path.symlink_to("/etc/passwd")
    with serve_here(settings, replica) as local:
        assert local.http.get(stream_of(name)).status_code == 404


# -- clients that are slow, gone or many ----------------------------------------------------------


def readers(path: Path) -> int:
    """How often this process has a file open."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # of this listing itself
            count += str(path) == str(link.readlink())
    return count


@pytest.fixture
def large_stream(local, settings) -> tuple[str, Path]:
    """The id of a video, and its stream, which is large now."""
    name = local.create()
    local.when(name, "completed")
    path = settings.folder / name / "live.mp4"
    with path.open("ab") as file:
        file.truncate(30_000_000)
    close_to_others(path)
    return name, path


def test_a_watcher_that_does_not_read_is_dropped(local, large_stream, monkeypatch):
    name, path = large_stream
    monkeypatch.setattr(download, "STALL_S", 0.5)
    with asking(local, stream_of(name), patience_s=120) as connection:
        until(lambda: readers(path) > 0)
        until(lambda: readers(path) == 0)
        assert local.http.get("/health").status_code == 200
        received = 0
        with suppress(ConnectionResetError):
            while piece := connection.recv(2**20):
                received += len(piece)
    assert received < 15_000_000


def test_a_watcher_may_wait_for_as_long_as_the_video_takes(local, held, monkeypatch):
    """What it has not been sent, it need not take."""
    monkeypatch.setattr(download, "STALL_S", 2.0)
    monkeypatch.setattr(events, "HEARTBEAT_S", 0.1)
    name = local.create(WINDOWS)
    with local.http.stream("GET", f"/v1/videos/{name}/events", timeout=120) as answer:
        watcher, lines, beats = Watcher(local, name), answer.iter_lines(), 0
        watcher.has(1)
        while beats < 30:  # 3 s, in which there is nothing to take
            beats += next(lines).startswith(":")
        held.let.release(2)
        assert len(frames_of(watcher.end())) == FRAMES[-1]


def test_watchers_that_go_away_are_forgotten(local, held, settings):
    name = local.create(WINDOWS)
    path = settings.folder / name / "live.mp4"
    until(path.exists)
    with ExitStack() as clients:
        for kind in ("stream", "events"):
            connection = clients.enter_context(
                asking(local, f"/v1/videos/{name}/{kind}", patience_s=120)
            )
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        until(lambda: readers(path) == 2)  # of the writer, and one
    until(lambda: readers(path) == 1)
    held.let.release(2)
    local.when(name, "completed")


def test_no_more_than_so_many_watch(local, monkeypatch):
    monkeypatch.setattr(watching, "MAX_WATCHERS", 1)
    name = local.create(LONG)
    with local.http.stream("GET", f"/v1/videos/{name}/events"):
        answer = local.http.get(stream_of(name))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_watchers")
        assert answer.headers["retry-after"] == "10"
    until(lambda: local.http.head(f"/v1/videos/{name}").status_code)
    local.delete(name)
    until(lambda: local.http.get(stream_of(name)).status_code == 404)


# -- events -----------------------------------------------------------------------------------


def parsed(lines: Iterator[str]) -> Iterator[tuple[str, str, dict]]:
    """The id, kind and data of each event."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if not line and "data" in fields:
            yield fields["id"], fields["event"], json.loads(fields["data"])
            fields = {}
        elif name:
            fields[name] = value


def events_of(local, name: str, **headers: str) -> list[tuple[str, str, dict]]:
    with local.http.stream(
        "GET", f"/v1/videos/{name}/events", headers=headers, timeout=120
    ) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        return list(parsed(answer.iter_lines()))


def test_events_from_the_line_to_the_end(local, held):
    running = [local.create(LONG) for _ in range(2)]  # as many as engines have
    for name in running:
        local.when(name, "in_progress")
    names = [local.create(WINDOWS) for _ in range(2)]
    with local.http.stream("GET", f"/v1/videos/{names[1]}/events", timeout=120) as answer:
        found = parsed(answer.iter_lines())
        seen = [next(found)]
        local.delete(names[0])
        seen.append(next(found))
        assert [(kind, data["place"]) for _, kind, data in seen] == [("queued", 2), ("queued", 1)]
        for name in running:
            local.delete(name)
        held.let.release(2)
        seen += found
    kinds = [kind for _, kind, _ in seen]
    assert kinds[:2] == ["queued"] * 2 and set(kinds[2:-1]) <= {"queued", "progress", "window"}
    assert kinds[-1] == "completed" and kinds.count("completed") == 1
    states = [data for _, _, data in seen]
    assert {data["id"] for data in states} == {names[1]}
    assert all(before["progress"] <= after["progress"] for before, after in pairwise(states))
    assert {"denoise", "decode_video"} <= {data["stage"] for data in states}
    assert {data["frames"] for _, kind, data in seen if kind == "window"} <= set(FRAMES)
    steps = [data for data in states if data["stage"] == "decode_video"]
    assert all(data["step"] <= data["steps"] == FRAMES[-1] for data in steps)
    assert states[-1]["progress"] == 100 and states[-1]["place"] is None


def test_whoever_comes_again_gets_the_state_at_once(local, held):
    name = local.create(WINDOWS)
    watcher = Watcher(local, name)
    watcher.has(1)
    for last in ("", "1", "9999", "completed", "\u00e4 b"):
        headers = {"Last-Event-ID": last.encode("latin-1")}
        with local.http.stream("GET", f"/v1/videos/{name}/events", headers=headers) as answer:
            (_, kind, data), (_, second, _) = islice(parsed(answer.iter_lines()), 2)
        assert (kind, second) == ("progress", "window")
        assert (data["status"], data["frames"]) == ("in_progress", FRAMES[0])
    held.let.release(2)
    local.when(name, "completed")
    ((last, kind, data),) = events_of(local, name)
    assert (last, kind, data["status"]) == ("completed", "completed", "completed")
    path = f"/v1/videos/{name}/events"
    assert local.http.get(path, headers={"Last-Event-ID": last}).status_code == 204
    assert local.http.get(path, headers={"Last-Event-ID": "7"}).status_code == 200


def test_events_of_what_fails_and_what_is_removed(settings, replica, serve_here):
    async def make(work):
        yield Report("prepare", 0, 0)
        if work.request.prompt == "fail":
            raise RuntimeError
        await watching.asyncio.sleep(600)

    with serve_here(settings, replica, make) as local:
        seen = events_of(local, local.create({**SMALL, "prompt": "fail"}))
        assert seen[-1][1] == "failed" and seen[-1][2]["error"]["code"] == "internal_error"
        name = local.create()
        with local.http.stream("GET", f"/v1/videos/{name}/events", timeout=120) as answer:
            found = parsed(answer.iter_lines())
            assert next(found)[1] in ("queued", "progress")
            local.delete(name)
            (*_, last) = found
        assert last == ("deleted", "deleted", {"id": name, "deleted": True})


def test_seconds_left_are_told_once_a_video_has_been_made(local, held):
    held.let.release(100)
    name = local.create(LONG)
    local.when(name, "in_progress")
    with local.http.stream("GET", f"/v1/videos/{name}/events", timeout=120) as answer:
        found = parsed(answer.iter_lines())
        first = next(data for _, _, data in found if 5 <= data["progress"] < 80)
        later = next(data for _, _, data in found if data["progress"] > first["progress"] + 3)
    assert first["seconds_left"] > 0 and later["seconds_left"] > 0
    local.delete(name)
    local.when(local.create(), "completed")
    running = [local.create(LONG) for _ in range(2)]
    for each in running:
        local.when(each, "in_progress")
    waiting = [local.create(LONG) for _ in range(2)]
    left_s = []
    for each in waiting:
        with local.http.stream("GET", f"/v1/videos/{each}/events", timeout=120) as answer:
            left_s.append(next(parsed(answer.iter_lines()))[2]["seconds_left"])
    assert 0 < left_s[0] < left_s[1]
    for each in (*waiting, *running):
        local.delete(each)


def test_a_server_that_stops_ends_what_waits(settings, replica, serve_here):
    with serve_here(settings, replica) as local:
        names = [local.create(LONG) for _ in range(3)]
        local.when(names[0], "in_progress")
        watcher = Watcher(local, names[2])
        with local.http.stream("GET", f"/v1/videos/{names[2]}/events", timeout=120) as answer:
            found = parsed(answer.iter_lines())
            assert next(found)[1] == "queued"
            local.run(local.jobs[0].drain(0))
            (*_, last) = [None, *found]
        assert last is None or last[1] == "queued"
        assert watcher.end() and watcher.status == 503
