"""Threads that are kept for the next piece of work.

What a thread frees stays in an arena of the C library, one of up to eight for each processor, and
each new thread takes any of them; cuDNN's plans of convolutions are kept by thread in PyTorch. With
new threads for every clip more and more memory would hold a clip's worth, and plans would be made
anew each time.
"""

from __future__ import annotations

import contextvars
import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

MOST = 4096  # of a process and a name; what comes beyond waits for these


def spawn(work: Callable[[], Result], name: str = "magihuman") -> Future[Result]:
    """Run work in another thread, in the caller's context; the future has its result.

    The future cannot be cancelled. name: of the threads, which are shared by what has the same one.
    """
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            result = context.run(work)
        except BaseException as error:  # raised where the result is taken
            future.set_exception(error)
        else:
            future.set_result(result)

    _threads(os.getpid(), name).submit(run)
    return future


@functools.cache
def _threads(process: int, name: str) -> ThreadPoolExecutor:
    """Those of this process: a fork has none of its parent's."""
    return ThreadPoolExecutor(MOST, name)
