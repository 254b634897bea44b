"""Lines of the log on their way from each process of the server to its command.

The command listens on a socket in its private folder and prints what comes to standard error. What
is logged waits in a thread of its own, so that nothing of the server waits for whoever reads it.
"""

from __future__ import annotations

import atexit
import logging
import logging.handlers
import os
import queue
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from magihuman.runtime.serving.observe.lines import formatter, videos

SOCKET_VARIABLE = "MAGIHUMAN_LOG_SOCKET"  # set by the command for the processes that it starts
SOCKET = "log"
LARGEST_BYTES = 2**16  # of a line; what is longer is cut
WAITING = 10_000  # lines; more are dropped
POLL_S = 0.2

_ends = ExitStack()
atexit.register(_ends.close)


@contextmanager
def listening(folder: Path) -> Iterator[None]:
    """Print the lines that other processes send, in a thread, until the context ends."""
    place = folder / SOCKET
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as lines:
        lines.bind(os.fspath(place))
        lines.settimeout(POLL_S)
        is_over = threading.Event()
        thread = threading.Thread(target=_print, args=(lines, is_over), name="log", daemon=True)
        os.environ[SOCKET_VARIABLE] = os.fspath(place)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
            del os.environ[SOCKET_VARIABLE]
            place.unlink(missing_ok=True)


def _print(lines: socket.socket, is_over: threading.Event) -> None:
    """Print what comes, and what has come by the time that it is over."""
    while True:
        try:
            line = lines.recv(LARGEST_BYTES).decode("utf-8", "replace")
        except TimeoutError:
            if is_over.is_set():
                return
            continue
        except OSError:
            return
        with suppress(OSError, ValueError):  # nobody reads it
            print(line, file=sys.stderr, flush=True)


class SocketHandler(logging.Handler):
    """Sends lines to the command that has started this process."""

    def __init__(self, place: str) -> None:
        """Raises `OSError` where nobody listens."""
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.connect(place)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Send no more."""
        self._socket.close()
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record. Where it cannot be sent it is lost: its command has ended."""
        with suppress(OSError):
            line = self.format(record).encode("utf-8", "replace")
            self._socket.send(line[:LARGEST_BYTES])


class _Waiting(logging.handlers.QueueHandler):
    """Has records wait for the thread that sends them, and drops them where too many do."""

    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(queue.Full):
            self.queue.put_nowait(record)

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # its own fields and traceback are formed in the thread


def set_up() -> None:
    """Send warnings of all libraries, and a line for each video, to the command.

    For a process of the server. Where no command listens, as on another machine, they go to this
    process's standard error. What a request's plan warns of is in its video's line.
    """
    place = os.environ.get(SOCKET_VARIABLE)
    target: logging.Handler = logging.StreamHandler()
    if place is not None:
        with suppress(OSError):
            target = SocketHandler(place)
    target.setFormatter(formatter())
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(WAITING)
    handler = _Waiting(waiting)
    handler.addFilter(_is_for_people)
    logging.getLogger().addHandler(handler)
    videos.setLevel(logging.INFO)
    listener = logging.handlers.QueueListener(waiting, target)
    listener.start()
    _ends.callback(_finish, listener)


def finish() -> None:
    """Send what waits, for a process that ends without Python's own end."""
    _ends.close()


def _finish(listener: logging.handlers.QueueListener) -> None:
    with suppress(queue.Full):  # of lines that cannot be sent
        listener.stop()


def _is_for_people(record: logging.LogRecord) -> bool:
    return not (record.name == "magihuman" and record.module == "pipeline")
