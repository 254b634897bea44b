"""A cluster of this machine alone, that begins and ends with this process."""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from magihuman.runtime.errors import DeviceError
from magihuman.runtime.serving.cluster.folder import close_to_others, private_folder

OBJECT_STORE_BYTES = 256 * 2**20  # messages alone pass through it; videos go by the disk


@contextmanager
def cluster() -> Iterator[None]:
    """Run a cluster. `environment.isolate` must have been called before Ray was imported.

    Raises `DeviceError` where Ray cannot run, or would take anybody.
    """
    os.umask(0o077)  # of all its processes, too
    with private_folder() as folder:
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.WARNING,
                _temp_dir=str(folder),
            )
            close_to_others(folder)
            _check(ray.util.get_node_ip_address())
            yield
        except (RayError, RayServeException, RuntimeError) as error:
            raise DeviceError(f"the server cannot run: {error}") from error
        finally:
            serve.shutdown()
            ray.shutdown()


def _check(address: str) -> None:
    """Refuse a cluster that takes anybody, or from anywhere."""
    if not is_token_auth_enabled():
        raise DeviceError("Ray must ask for its token (RAY_AUTH_MODE), and does not")
    if not ipaddress.ip_address(address).is_loopback:
        raise DeviceError(f"Ray must listen on this machine alone, and has the address {address}")
