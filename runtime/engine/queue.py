"""Who is next: a bounded queue, first in, first out, through stages that serve one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import TracebackType
from typing import Self, TypeVar

from magihuman.runtime.errors import MagiHumanError, QueueFull
from magihuman.runtime.pipeline import Limits

Started = TypeVar("Started")


class QueueStage(IntEnum):
    """What requests queue for, in the order in which they pass it; each serves one at a time.

    ENCODE runs the encoders, DEVICE the transformers and the decoders.
    """

    ENCODE = 0
    DEVICE = 1


class RequestQueue:
    """The requests that are not yet done with the device, oldest first. For any thread."""

    def __init__(self, limit: int) -> None:
        """limit: requests that may wait behind the first."""
        self._limit = limit
        self._changed = threading.Condition()
        self._tickets: list[Ticket] = []
        self._last_number = 0
        self._refusal: Callable[[], MagiHumanError] | None = None

    def __len__(self) -> int:
        """How many requests have a place, the first included."""
        return len(self._tickets)

    def join(self, limits: Limits, refusal: MagiHumanError | None = None) -> Ticket:
        """A place at the end of the queue. Where there is none, `Ticket.check` raises why.

        limits: what ends the request's waiting. refusal: why the request is to be given no place;
        it gets a number all the same.
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
        """Return once no request has a place."""
        with self._changed:
            self._changed.wait_for(lambda: not self._tickets)

    def enter(self, ticket: Ticket, stage: QueueStage) -> None:
        """Wait until all who came before have passed the stage.

        Raises:
            Cancelled, DeadlineExceeded: by the ticket's limits.
            MagiHumanError: the queue was closed by `refuse`.
        """
        with self._changed:
            while True:
                ticket.limits.check()
                if self._refusal is not None:
                    raise self._refusal()
                if self._is_next(ticket, stage):
                    return
                self._changed.wait(ticket.limits.look_s())

    def is_next(self, ticket: Ticket, stage: QueueStage) -> bool:
        """Whether `enter` would return at once."""
        with self._changed:
            return self._is_next(ticket, stage)

    def _is_next(self, ticket: Ticket, stage: QueueStage) -> bool:
        before = self._tickets[: self._tickets.index(ticket)]
        return all(other.passed > stage for other in before)

    def move(self, ticket: Ticket, passed: int) -> None:
        """Note that the ticket has passed so many stages, and wake those who wait."""
        with self._changed:
            ticket.passed = passed
            self._changed.notify_all()

    def leave(self, ticket: Ticket) -> None:
        """Free the ticket's place, if it still has one."""
        with self._changed:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
                self._changed.notify_all()


class Ticket:
    """A request's place in the queue, held for as long as the context lasts.

    Attributes:
        number: of the request, in the order of arrival, from 1.
        limits: what ends its waiting.
        refusal: why it has no place, or None where it has one.
        passed: how many stages are behind it.
    """

    def __init__(
        self, queue: RequestQueue, number: int, limits: Limits, refusal: MagiHumanError | None
    ) -> None:
        self.number, self.limits, self.refusal = number, limits, refusal
        self.passed = 0
        self._queue = queue

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
        """Raise `refusal`, where there is no place."""
        if self.refusal is not None:
            raise self.refusal

    def wait(self, stage: QueueStage) -> None:
        """Wait until all who came before have passed the stage; see `RequestQueue.enter`."""
        self._queue.enter(self, stage)

    def is_next(self, stage: QueueStage) -> bool:
        """Whether `wait` would return at once."""
        return self._queue.is_next(self, stage)

    @contextmanager
    def at(self, stage: QueueStage) -> Iterator[None]:
        """The stage to itself, once `wait` has returned; those behind come next."""
        try:
            yield
        finally:
            self._queue.move(self, stage + 1)

    def start(self, start: Callable[[], Started]) -> Started:
        """Start the thread that has the place from now on, and give it up where that fails."""
        try:
            return start()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Give the place up; a second time does nothing."""
        self._queue.leave(self)
