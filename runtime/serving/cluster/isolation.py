"""What Ray reads from the environment, set before it is imported: nobody else's settings."""

from __future__ import annotations

import os
import secrets

PREFIX = "RAY_"
# When Ray ends a process for lack of memory.
KEPT = ("RAY_memory_usage_threshold", "RAY_memory_monitor_refresh_ms")


def isolate() -> None:
    """Set Ray's variables for a cluster on this machine that takes only those with its token.

    Others of Ray's variables are removed, since they can open its ports, switch its token off, or
    have it run what they say; `KEPT` has those that stay.
    """
    for name in [name for name in os.environ if name.startswith(PREFIX) and name not in KEPT]:
        del os.environ[name]
    os.environ.update(
        RAY_AUTH_MODE="token",
        # By default it is kept in the home folder, which a service may not have, and is shared by
        # all clusters of a user.
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        # Despite its name it says, on every system, whether a cluster may have other machines;
        # without, nodes have the loopback address, and that alone is listened on.
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        RAY_DISABLE_FAILURE_SIGNAL_HANDLER="1",  # it aborts a process that is told to stop
        RAY_USAGE_STATS_ENABLED="0",
    )
