"""A cluster of this machine alone, that begins and ends with this process; or one that is there."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import ray
from ray._private import utils
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from magihuman.runtime.errors import DeviceError, InvalidRequestError
from magihuman.runtime.serving.cluster.folder import close_to_others, private_folder, remove
from magihuman.runtime.serving.cluster.watch import watched
from magihuman.runtime.serving.observe import relay

REACH_S = 10.0
OBJECT_STORE_BYTES = 256 * 2**20  # messages alone pass through it; videos go by the disk


@contextmanager
def cluster(is_loud: bool = False) -> Iterator[None]:
    """Run a cluster. `isolation.isolate` must have been called before Ray was imported.

    is_loud: whether what Ray and its processes say is printed, beside the lines of the log.

    Signals stay as they are. Where Ray ends, this process ends: see `watch.watched`.

    Raises `DeviceError` where Ray cannot run, or would take anybody.
    """
    os.umask(0o077)  # of all its processes, too
    with private_folder() as folder, ExitStack() as stack:
        try:
            stack.enter_context(relay.listening(folder.parent))
            with _signals_kept():
                _start(folder, is_loud)
            with watched(folder, lambda: remove(folder.parent)):
                close_to_others(folder)
                _check(ray.util.get_node_ip_address())
                yield
        except (RayError, RayServeException, RuntimeError) as error:
            raise DeviceError(f"the server cannot run: {error}") from error
        finally:
            ray.shutdown()  # with all its processes, also those of Serve


@contextmanager
def joined(address: str, is_loud: bool = False) -> Iterator[None]:
    """Take part in a cluster that is there, and leave it in the end. Signals stay as they are.

    Raises `DeviceError` where it cannot be reached, or ends, and `InvalidRequestError` for what is
    no address.
    """
    check_reached(address)
    level = logging.WARNING if is_loud else logging.ERROR
    try:
        with _signals_kept():
            ray.init(address, logging_level=level, log_to_driver=is_loud)
        yield
    except (RayError, RayServeException, RuntimeError, ConnectionError) as error:
        raise DeviceError(f"the cluster at {address} cannot be used: {error}") from error
    finally:
        ray.shutdown()


def check_reached(address: str) -> None:
    """Refuse an address where nobody listens: Ray would go on trying, whatever it is told.

    Raises `DeviceError`, and `InvalidRequestError` for what is no address.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise InvalidRequestError(
            f"the address of a Ray cluster must be auto, or HOST:PORT of its head, got {address}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except (OSError, OverflowError) as error:
        raise DeviceError(
            f"the cluster at {address} cannot be reached: {error}; start it, or name another"
        ) from error


def _start(folder: Path, is_loud: bool) -> None:
    level = logging.WARNING if is_loud else logging.ERROR
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(level)
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=level,
        log_to_driver=is_loud,
        _temp_dir=str(folder),
    )


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep Ray from handling SIGTERM, which it would answer by ending the process at once."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    own, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = own
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _check(address: str) -> None:
    """Refuse a cluster that takes anybody, or from anywhere."""
    if not is_token_auth_enabled():
        raise DeviceError("Ray must ask for its token (RAY_AUTH_MODE), and does not")
    if not ipaddress.ip_address(address).is_loopback:
        raise DeviceError(f"Ray must listen on this machine alone, and has the address {address}")
