"""The end of a server whose Ray has ended: nothing answers without it, or brings it back."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import psutil  # Ray's own
from ray._private import ray_constants
from ray._private.node import Node
from ray._private.worker import global_worker

from magihuman.runtime.serving.cluster.folder import close_to_others

# All others of Ray's processes are started again, or the raylet ends with them.
VITAL = {ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER}
PAUSE_S = 0.5
FAILED = 1


@contextmanager
def watched(folder: Path, clean: Callable[[], None]) -> Iterator[None]:
    """End this process, with exit code 1, where a vital process of its Ray ends meanwhile.

    Whatever this process waits for then, it waits in vain, so that no exception could end it. For a
    process that has started Ray.

    Args:
        folder: Ray's own, kept closed, since its processes open it to everybody when they start.
        clean: called before the end.
    """
    node, is_over = cast("Node", global_worker.node), threading.Event()

    def watch() -> None:
        while not is_over.wait(PAUSE_S):
            with suppress(OSError):
                close_to_others(folder)
            dead = _dead(node)
            if dead and not is_over.is_set():
                _end(node, dead, clean)

    thread = threading.Thread(target=watch, name="watch of Ray", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _dead(node: Node) -> set[str]:
    return VITAL & {kind for kind, _ in node.dead_processes()}


def _end(node: Node, dead: set[str], clean: Callable[[], None]) -> None:
    message = (
        f"error: Ray's {' and '.join(sorted(dead))} ended unexpectedly; start the server again"
    )
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)
    with suppress(Exception):
        left = psutil.Process().children(recursive=True)
        node.kill_all_processes(check_alive=False, allow_graceful=False)
        for process in left:  # those that talk to one which has ended would go on trying
            with suppress(psutil.NoSuchProcess):
                process.kill()
    with suppress(Exception):
        clean()
    os._exit(FAILED)
