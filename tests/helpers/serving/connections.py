"""Clients of the server by their sockets: what no library does by itself."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from video_client import BEARER


def _place(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


@contextmanager
def asking(local, path: str, more: str = "", *, patience_s: float = 60) -> Iterator[socket.socket]:
    """A client with little room for the answer, of which it reads nothing by itself."""
    host, port = _place(local.url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(patience_s)
        connection.connect((host, port))
        request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{more}"
        connection.sendall(f"{request}Authorization: {BEARER['Authorization']}\r\n\r\n".encode())
        yield connection


@contextmanager
def half_sent(local, content: bytes, length: int, kind: str) -> Iterator[socket.socket]:
    """A client whose body, of this length and type, does not come to its end."""
    host, port = _place(local.url)
    with socket.create_connection((host, port), timeout=300) as connection:
        lines = [
            "POST /v1/videos HTTP/1.1",
            f"Host: {host}",
            f"Authorization: {BEARER['Authorization']}",
            f"Content-Type: {kind}",
            f"Content-Length: {length}",
        ]
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + content)
        yield connection
