"""The queue of requests by itself: order, bound, and leaving it early."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import pytest

from magihuman.runtime.engine.queue import QueueStage, RequestQueue, Ticket
from magihuman.runtime.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequestError,
    MagiHumanError,
    QueueFull,
)
from magihuman.runtime.pipeline.limits import Limits

AT_ONCE_S = 30.0  # far above the 20 ms that are promised: the machine may be busy


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def waiting(queue: RequestQueue, ticket: Ticket) -> tuple[threading.Thread, list[BaseException]]:
    def work() -> None:
        with ticket:
            ticket.wait(QueueStage.ENCODE)

    return in_thread(work)


def test_stages_serve_one_at_a_time_in_the_order_of_arrival() -> None:
    queue, seen = RequestQueue(100), []
    busy = dict.fromkeys(QueueStage, 0)

    def serve(ticket: Ticket) -> None:
        time.sleep(0.002 * (ticket.number % 3))  # they become ready in another order
        with ticket:
            for stage in QueueStage:
                ticket.wait(stage)
                with ticket.at(stage):
                    busy[stage] += 1
                    assert busy[stage] == 1
                    seen.append((stage, ticket.number))
                    time.sleep(0.001)
                    busy[stage] -= 1

    tickets = [queue.join(Limits()) for _ in range(20)]
    threads = [in_thread(lambda ticket=ticket: serve(ticket)) for ticket in reversed(tickets)]
    for thread, errors in threads:
        thread.join()
        assert errors == []
    for stage in QueueStage:
        assert [number for at, number in seen if at is stage] == list(range(1, 21))
    assert len(queue) == 0


def test_the_next_encodes_while_one_is_on_the_device() -> None:
    queue = RequestQueue(3)
    first, second, third = (queue.join(Limits()) for _ in range(3))
    with first.at(QueueStage.ENCODE):
        assert not second.is_next(QueueStage.ENCODE)
    with first.at(QueueStage.DEVICE):
        second.wait(QueueStage.ENCODE)
        assert not second.is_next(QueueStage.DEVICE)
        assert not third.is_next(QueueStage.ENCODE)
        with second.at(QueueStage.ENCODE):
            pass
        third.wait(QueueStage.ENCODE)
        with third.at(QueueStage.ENCODE):
            pass
        assert not second.is_next(QueueStage.DEVICE)
    second.wait(QueueStage.DEVICE)
    assert not third.is_next(QueueStage.DEVICE)  # ready, but not its turn


@pytest.mark.parametrize("limit", [0, 2])
def test_the_bound(limit: int) -> None:
    queue = RequestQueue(limit)
    tickets = [queue.join(Limits()) for _ in range(1 + limit)]
    refused = queue.join(Limits())
    with pytest.raises(QueueFull, match=f"no more than {limit} requests may wait"), refused:
        refused.check()
    assert len(queue) == 1 + limit
    tickets[0].leave()
    tickets[0].leave()  # twice is fine
    with queue.join(Limits()) as ticket:
        ticket.check()
        assert ticket.number == limit + 3  # the refused one has its number, too


def test_who_is_cancelled_while_waiting_leaves_at_once() -> None:
    queue, cancel = RequestQueue(5), threading.Event()
    first = queue.join(Limits())
    second, third = queue.join(Limits(cancel)), queue.join(Limits())
    thread, errors = waiting(queue, second)
    start = time.monotonic()
    cancel.set()
    thread.join()
    assert time.monotonic() - start < AT_ONCE_S
    assert isinstance(errors[0], Cancelled) and len(queue) == 2
    first.leave()
    third.wait(QueueStage.DEVICE)


def test_who_has_no_time_left_leaves_at_once() -> None:
    queue = RequestQueue(5)
    queue.join(Limits())
    start = time.monotonic()
    ticket = queue.join(Limits(deadline_s=0.1))
    with pytest.raises(DeadlineExceeded, match=r"within 0\.1 s"), ticket:
        ticket.wait(QueueStage.ENCODE)
    assert 0.1 <= time.monotonic() - start < 0.1 + AT_ONCE_S
    assert len(queue) == 1


def test_what_is_raised_at_a_station_frees_it() -> None:
    queue = RequestQueue(5)
    first, second = queue.join(Limits()), queue.join(Limits())
    with pytest.raises(KeyError), first, first.at(QueueStage.ENCODE):
        raise KeyError
    second.wait(QueueStage.DEVICE)
    assert len(queue) == 1


def test_a_line_that_is_closed() -> None:
    queue = RequestQueue(5)
    first, second = queue.join(Limits()), queue.join(Limits())
    with first.at(QueueStage.DEVICE):
        thread, errors = waiting(queue, second)
        queue.refuse(lambda: MagiHumanError("first"))
        queue.refuse(lambda: MagiHumanError("second"))
        thread.join()
        assert [str(error) for error in errors] == ["first"]
        with pytest.raises(MagiHumanError, match="first"):
            queue.join(Limits()).check()
        emptied, _ = in_thread(queue.wait_until_empty)
        emptied.join(0.05)
        assert emptied.is_alive()  # the first is still there
    first.leave()
    emptied.join()


@pytest.mark.parametrize("deadline_s", [0, -1, math.inf, math.nan, True, "1"])
def test_a_deadline_is_a_number_of_seconds(deadline_s: object) -> None:
    with pytest.raises(InvalidRequestError, match="deadline_s must be a number"):
        Limits(deadline_s=deadline_s)  # type: ignore[arg-type]
