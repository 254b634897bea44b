"""Clients that fetch a video too slowly, or not at all, over real HTTP."""

from __future__ import annotations

import os
import re
import socket
import struct
import tracemalloc
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from connections import asking
from video_client import TOKEN_SHA256, until

from magihuman.runtime.serving.settings import Settings
from magihuman.runtime.serving.transfer import download

VIDEO_BYTES = 30_000_000


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(tmp_path / "videos", "tiny", token_sha256=TOKEN_SHA256)


@pytest.fixture
def large_video(local, settings) -> tuple[str, Path, bytes]:
    """The id of a finished one, its file, and what is in it now."""
    name = local.create()
    local.when(name, "completed")
    path = settings.folder / name / "video.mp4"
    content = np.random.default_rng(1).bytes(VIDEO_BYTES)
    path.write_bytes(content)
    return name, path, content


def readers(path: Path) -> int:
    """How often this process has a file open, be it removed or not."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # of this listing itself
            count += str(path) in os.readlink(link)
    return count


def content_of(name: str) -> str:
    return f"/v1/videos/{name}/content"


def rest_of(connection: socket.socket) -> bytes:
    content = bytearray()
    try:
        while piece := connection.recv(2**20):
            content += piece
    except ConnectionResetError:
        pass
    return bytes(content)


@pytest.mark.parametrize("more", ["", "Range: bytes=5-\r\n", "Range: bytes=0-9,90-\r\n"])
def test_a_client_that_does_not_read_is_dropped(local, large_video, monkeypatch, more):
    name, path, content = large_video
    monkeypatch.setattr(download, "STALL_S", 0.5)
    with asking(local, content_of(name), more) as connection:
        until(lambda: readers(path) > 0)
        until(lambda: readers(path) == 0, within_s=30)
        assert local.http.get("/health").status_code == 200
        assert len(rest_of(connection)) < VIDEO_BYTES // 2
    assert local.content(name).content == content


def test_a_client_that_reads_slowly_is_dropped(local, large_video, monkeypatch):
    name, path, _ = large_video
    monkeypatch.setattr(download, "STALL_S", 1.0)
    monkeypatch.setattr(download, "BYTES_PER_S", 10 * VIDEO_BYTES)
    with asking(local, content_of(name)) as connection:
        until(lambda: readers(path) > 0)
        got = 0

        def is_dropped() -> bool:
            nonlocal got
            got += len(connection.recv(10_000))
            return readers(path) == 0

        until(is_dropped, within_s=30)
        assert got + len(rest_of(connection)) < VIDEO_BYTES


def test_a_client_that_goes_away_is_read_for_no_longer(local, large_video):
    name, path, _ = large_video
    for lingers in (False, True):
        with asking(local, content_of(name)) as connection:
            until(lambda: readers(path) > 0)
            if lingers:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until(lambda: readers(path) == 0, within_s=30)


def test_a_video_that_is_removed_while_it_is_fetched_comes_whole(local, large_video):
    name, path, content = large_video
    with asking(local, content_of(name), "Connection: close\r\n") as connection:
        until(lambda: readers(path) > 0)
        local.delete(name)
        assert local.content(name).status_code == 404
        got = rest_of(connection)
    head, _, body = got.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1.1 200 ", head) and body == content
    until(lambda: readers(path) == 0)


def test_many_who_do_not_read_cost_no_memory(local, large_video):
    name, path, _ = large_video
    tracemalloc.start()
    try:
        with ExitStack() as clients:
            for _ in range(6):
                clients.enter_context(asking(local, content_of(name)))
            until(lambda: readers(path) >= 6)
            assert local.http.get("/health").status_code == 200
            _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000
    until(lambda: readers(path) == 0)
