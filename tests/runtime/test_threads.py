"""Work in threads that are kept for the next."""

from __future__ import annotations

import contextvars
import multiprocessing
import threading
from concurrent.futures import CancelledError, wait

import pytest

from magihuman.runtime.threads import spawn

NAME = "kept for tests"


def test_threads_are_kept_and_as_many_as_work_at_once() -> None:
    for _ in range(20):
        assert spawn(threading.current_thread, NAME).result(300).name.startswith(NAME)
    here = [thread for thread in threading.enumerate() if thread.name.startswith(NAME)]
    assert len(here) <= 2  # the first may not be idle again when the second comes
    meeting = threading.Barrier(5)
    futures = [spawn(meeting.wait, NAME) for _ in range(5)]
    assert sorted(future.result(300) for future in futures) == list(range(5))


def test_what_work_raises_is_raised_where_its_result_is_taken() -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    future = spawn(fail, NAME)
    with pytest.raises(KeyboardInterrupt):
        future.result(300)
    assert spawn(lambda: 7, NAME).result(300) == 7


def test_work_has_the_context_of_its_caller() -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    for value in (1, 2):
        variable.set(value)
        assert spawn(variable.get, NAME).result(300) == value


def test_work_cannot_be_cancelled() -> None:
    going = threading.Event()
    future = spawn(going.wait, NAME)
    assert not future.cancel()
    going.set()
    try:
        assert future.result(300)
    except CancelledError:
        pytest.fail("it was cancelled")


def _in_a_fork(answers: multiprocessing.Queue[int]) -> None:
    answers.put(spawn(lambda: 11, NAME).result(300))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_has_threads_of_its_own() -> None:
    wait([spawn(lambda: None, NAME)])
    forking = multiprocessing.get_context("fork")
    answers = forking.Queue()
    child = forking.Process(target=_in_a_fork, args=(answers,))
    child.start()
    assert answers.get(timeout=300) == 11
    child.join(300)
    assert child.exitcode == 0
