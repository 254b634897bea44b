"""The line of requests by itself: order, bound, and leaving it early."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import pytest

from magihuman.runtime.engine.queue import Line, Station, Ticket
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


def waiting(line: Line, ticket: Ticket) -> tuple[threading.Thread, list[BaseException]]:
    def work() -> None:
        with ticket:
            ticket.wait(Station.ENCODE)

    return in_thread(work)


def test_stations_serve_one_at_a_time_in_the_order_of_arrival() -> None:
    line, seen = Line(100), []
    busy = dict.fromkeys(Station, 0)

    def serve(ticket: Ticket) -> None:
        time.sleep(0.002 * (ticket.number % 3))  # they become ready in another order
        with ticket:
            for station in Station:
                ticket.wait(station)
                with ticket.at(station):
                    busy[station] += 1
                    assert busy[station] == 1
                    seen.append((station, ticket.number))
                    time.sleep(0.001)
                    busy[station] -= 1

    tickets = [line.join(Limits()) for _ in range(20)]
    threads = [in_thread(lambda ticket=ticket: serve(ticket)) for ticket in reversed(tickets)]
    for thread, errors in threads:
        thread.join()
        assert errors == []
    for station in Station:
        assert [number for at, number in seen if at is station] == list(range(1, 21))
    assert len(line) == 0


def test_the_next_encodes_while_one_is_on_the_device() -> None:
    line = Line(3)
    first, second, third = (line.join(Limits()) for _ in range(3))
    with first.at(Station.ENCODE):
        assert not second.is_next(Station.ENCODE)
    with first.at(Station.DEVICE):
        second.wait(Station.ENCODE)
        assert not second.is_next(Station.DEVICE)
        assert not third.is_next(Station.ENCODE)
        with second.at(Station.ENCODE):
            pass
        third.wait(Station.ENCODE)
        with third.at(Station.ENCODE):
            pass
        assert not second.is_next(Station.DEVICE)
    second.wait(Station.DEVICE)
    assert not third.is_next(Station.DEVICE)  # ready, but not its turn


@pytest.mark.parametrize("limit", [0, 2])
def test_the_bound(limit: int) -> None:
    line = Line(limit)
    tickets = [line.join(Limits()) for _ in range(1 + limit)]
    refused = line.join(Limits())
    with pytest.raises(QueueFull, match=f"no more than {limit} requests may wait"), refused:
        refused.check()
    assert len(line) == 1 + limit
    tickets[0].leave()
    tickets[0].leave()  # twice is fine
    with line.join(Limits()) as ticket:
        ticket.check()
        assert ticket.number == limit + 3  # the refused one has its number, too


def test_who_is_cancelled_while_waiting_leaves_at_once() -> None:
    line, cancel = Line(5), threading.Event()
    first = line.join(Limits())
    second, third = line.join(Limits(cancel)), line.join(Limits())
    thread, errors = waiting(line, second)
    start = time.monotonic()
    cancel.set()
    thread.join()
    assert time.monotonic() - start < AT_ONCE_S
    assert isinstance(errors[0], Cancelled) and len(line) == 2
    first.leave()
    third.wait(Station.DEVICE)


def test_who_has_no_time_left_leaves_at_once() -> None:
    line = Line(5)
    line.join(Limits())
    start = time.monotonic()
    ticket = line.join(Limits(deadline_s=0.1))
    with pytest.raises(DeadlineExceeded, match=r"within 0\.1 s"), ticket:
        ticket.wait(Station.ENCODE)
    assert 0.1 <= time.monotonic() - start < 0.1 + AT_ONCE_S
    assert len(line) == 1


def test_what_is_raised_at_a_station_frees_it() -> None:
    line = Line(5)
    first, second = line.join(Limits()), line.join(Limits())
    with pytest.raises(KeyError), first, first.at(Station.ENCODE):
        raise KeyError
    second.wait(Station.DEVICE)
    assert len(line) == 1


def test_a_line_that_is_closed() -> None:
    line = Line(5)
    first, second = line.join(Limits()), line.join(Limits())
    with first.at(Station.DEVICE):
        thread, errors = waiting(line, second)
        line.refuse(lambda: MagiHumanError("first"))
        line.refuse(lambda: MagiHumanError("second"))
        thread.join()
        assert [str(error) for error in errors] == ["first"]
        with pytest.raises(MagiHumanError, match="first"):
            line.join(Limits()).check()
        emptied, _ = in_thread(line.wait_until_empty)
        emptied.join(0.05)
        assert emptied.is_alive()  # the first is still there
    first.leave()
    emptied.join()


@pytest.mark.parametrize("deadline_s", [0, -1, math.inf, math.nan, True, "1"])
def test_a_deadline_is_a_number_of_seconds(deadline_s: object) -> None:
    with pytest.raises(InvalidRequestError, match="deadline_s must be a number"):
        Limits(deadline_s=deadline_s)  # type: ignore[arg-type]
