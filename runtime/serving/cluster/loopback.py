"""The one port of Ray that its address does not close: a replica's, for calls over gRPC."""

from __future__ import annotations

from functools import partial
from typing import Any


def close_replica() -> None:
    """Have the replica that this process becomes listen on loopback, not on all addresses.

    To be called while it is made. Where Ray keeps this elsewhere nothing changes: the port then
    takes calls with the cluster's token, as it does in any case.
    """
    from ray.serve._private import replica

    add = getattr(replica, "add_port_to_grpc_server", None)
    if add is not None:
        replica.add_port_to_grpc_server = partial(_on_loopback, add)  # type: ignore[attr-defined]


def _on_loopback(add: Any, server: Any, address: str) -> int:
    for everywhere in ("[::]", "0.0.0.0"):  # noqa: S104 - what is replaced
        address = address.replace(everywhere, "127.0.0.1")
    return add(server, address)
