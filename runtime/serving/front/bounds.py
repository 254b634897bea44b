"""What one client, and all of them, may take of the server before it knows who they are."""

from __future__ import annotations

import resource
from dataclasses import dataclass

SPARE_FILES = 256  # for all that a process has open beside connections


@dataclass(frozen=True)
class Bounds:
    """Limits of connections.

    Attributes:
        head_bytes, head_lines: of a request before its body: its first line and its headers.
        head_s: from the connection, or the last answer, until the next request has all its headers.
        idle_s: until a client that takes nothing of an answer is dropped.
        linger_s: for what a client still sends that has been refused, so that it reads why.
        connections: open at once.
        message_bytes: of a message of a WebSocket.
    """

    head_bytes: int = 64 * 2**10
    head_lines: int = 128
    head_s: float = 20.0
    idle_s: float = 60.0
    linger_s: float = 2.0
    connections: int = 1000
    message_bytes: int = 12 * 2**20


def room_for(connections: int) -> int:
    """Return how many connections fit the process's limit of open files, raised where it can be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(1, min(connections, soft - SPARE_FILES))
    return connections
