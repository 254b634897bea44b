"""Clients of `magihuman serve` that go away in the midst of a body or a video."""

from __future__ import annotations

import socket
import struct
import time
from contextlib import contextmanager

import pytest
from video_client import BEARER, SMALL

pytest.importorskip("ray", reason="the extra [serve] is not installed")

FORM_TYPE = "multipart/form-data; boundary=the-line"
HALF = (
    b'--the-line\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nhi\r\n'
    b'--the-line\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n'
) + b"x" * 100_000

KINDS = [("application/json", b'{"prompt": "'), (FORM_TYPE, HALF), (FORM_TYPE, b"")]


@contextmanager
def asked(server, method: str, path: str, more: str = "", content: bytes = b""):
    """A connection on which this has been sent."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=300) as connection:
        head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{more}"
        head += f"Authorization: {BEARER['Authorization']}\r\n\r\n"
        connection.sendall(head.encode() + content)
        yield connection


def lingering(connection: socket.socket) -> None:
    """Have it be reset, and not closed."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_bodies_and_videos_that_are_cut_leave_no_traceback(server):
    before = len(server.log.read_bytes())
    name = server.create(SMALL)
    server.when(name, "completed")
    for index in range(24):
        kind, content = KINDS[index % len(KINDS)]
        more = f"Content-Type: {kind}\r\nContent-Length: 900000\r\n"
        with asked(server, "POST", "/v1/videos", more, content) as connection:
            time.sleep(0.05)  # it is being read, on most machines
            if index % 2:
                lingering(connection)
    for _ in range(4):
        with asked(server, "GET", f"/v1/videos/{name}/content") as connection:
            lingering(connection)
    server.delete(name)
    server.when(server.create(SMALL), "completed")  # by then all has been noticed
    assert "Traceback" not in server.log.read_bytes()[before:].decode()
