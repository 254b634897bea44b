"""Who is next: a bounded line, first in, first out, through stations that serve one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import TracebackType
from typing import Self

from magihuman.runtime.errors import (
    MagiHumanError,
    QueueFull,
)
from magihuman.runtime.pipeline import Limits


class Station(IntEnum):
    """In the order in which a request passes them. One request is at each at a time."""

    ENCODE = 0
    DEVICE = 1


class Line:
    """The requests that are not yet done with the device, oldest first. For any thread."""

    def __init__(self, limit: int) -> None:
        """limit: requests that may wait behind the first."""
        self._limit = limit
        self._changed = threading.Condition()
        self._tickets: list[Ticket] = []
        self._last_number = 0
        self._refusal: Callable[[], MagiHumanError] | None = None

    def __len__(self) -> int:
        """Requests in line, the first included."""
        return len(self._tickets)

    def join(self, limits: Limits, refusal: MagiHumanError | None = None) -> Ticket:
        """A place at the end. Where there is none, `Ticket.check` raises why.

        refusal: why the request is to be given no place; it gets a number all the same.
        """
        with self._changed:
            self._last_number += 1
            if refusal is None and self._refusal is not None:
                refusal = self._refusal()
            elif refusal is None and len(self._tickets) > self._limit:
                refusal = QueueFull(
                    f"no more than {self._limit} requests may wait, and so many do; try again"
                    " later, or load(..., queue_limit=...) with more"
                )
            ticket = Ticket(self, self._last_number, limits, refusal)
            if refusal is None:
                self._tickets.append(ticket)
            return ticket

    def refuse(self, reason: Callable[[], MagiHumanError]) -> None:
        """Give nobody a place any more, and raise this for all who wait. The first reason stays."""
        with self._changed:
            self._refusal = self._refusal or reason
            self._changed.notify_all()

    def wait_until_empty(self) -> None:
        """Return once nobody is in line."""
        with self._changed:
            self._changed.wait_for(lambda: not self._tickets)

    def enter(self, ticket: Ticket, station: Station) -> None:
        """Wait until all who came before have passed the station.

        Raises:
            Cancelled, DeadlineExceeded: by the ticket's limits.
            MagiHumanError: the line was closed by `refuse`.
        """
        with self._changed:
            while True:
                ticket.limits.check()
                if self._refusal is not None:
                    raise self._refusal()
                if self._is_next(ticket, station):
                    return
                self._changed.wait(ticket.limits.look_s())

    def is_next(self, ticket: Ticket, station: Station) -> bool:
        """Whether `enter` would return at once."""
        with self._changed:
            return self._is_next(ticket, station)

    def _is_next(self, ticket: Ticket, station: Station) -> bool:
        before = self._tickets[: self._tickets.index(ticket)]
        return all(other.passed > station for other in before)

    def move(self, ticket: Ticket, passed: int) -> None:
        """The ticket has passed so many stations."""
        with self._changed:
            ticket.passed = passed
            self._changed.notify_all()

    def leave(self, ticket: Ticket) -> None:
        """The ticket's place is free. Twice is fine."""
        with self._changed:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
                self._changed.notify_all()


class Ticket:
    """A request's place in line, held for as long as the context lasts.

    Attributes:
        number: of the request, in the order of arrival, from 1.
        limits: what ends its waiting.
        refusal: why it has no place, where it has none.
        passed: stations behind it.
    """

    def __init__(
        self, line: Line, number: int, limits: Limits, refusal: MagiHumanError | None
    ) -> None:
        self.number, self.limits, self.refusal = number, limits, refusal
        self.passed = 0
        self._line = line

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.leave()

    def check(self) -> None:
        """Raise why there is no place, where there is none."""
        if self.refusal is not None:
            raise self.refusal

    def wait(self, station: Station) -> None:
        """See `Line.enter`."""
        self._line.enter(self, station)

    def is_next(self, station: Station) -> bool:
        """Whether `wait` would return at once."""
        return self._line.is_next(self, station)

    @contextmanager
    def at(self, station: Station) -> Iterator[None]:
        """The station to itself, once `wait` has returned; those behind come next."""
        try:
            yield
        finally:
            self._line.move(self, station + 1)

    def leave(self) -> None:
        """Give the place up."""
        self._line.leave(self)
