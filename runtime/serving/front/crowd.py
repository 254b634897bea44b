"""All connections of a server: as many as may be, and whoever has waited longest goes first."""

from __future__ import annotations

from typing import Protocol


class Member(Protocol):
    """A connection."""

    def drop(self) -> None:
        """Close it at once."""


class Crowd:
    """Counts connections. For one event loop.

    Those that have no request are the ones to go where too many come, the oldest first, so that a
    crowd that says nothing keeps nobody out.
    """

    def __init__(self, most: int) -> None:
        """most: connections open at once."""
        self._most = most
        self._all: set[Member] = set()
        self._idle: dict[Member, None] = {}  # in the order in which they came to be

    def __len__(self) -> int:
        return len(self._all)

    def join(self, member: Member) -> bool:
        """Take a new one, which is idle. Returns whether there is room for it."""
        if len(self._all) >= self._most:
            oldest = next(iter(self._idle), None)
            if oldest is None:
                return False
            self.leave(oldest)
            oldest.drop()
        self._all.add(member)
        self._idle[member] = None
        return True

    def busy(self, member: Member) -> None:
        """Note that it has a request."""
        self._idle.pop(member, None)

    def idle(self, member: Member) -> None:
        """Note that it has none any more."""
        if member in self._all:
            self._idle[member] = None

    def leave(self, member: Member) -> None:
        """Forget it."""
        self._all.discard(member)
        self._idle.pop(member, None)
