"""Where processes listen, read from Linux's /proc."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

LISTEN = "0A"


def listening(processes: list[int]) -> dict[int, str]:
    """The ports at which these processes listen, and the address of each."""
    inodes = set()
    for process in processes:
        with suppress(FileNotFoundError):  # it has ended
            for place in Path(f"/proc/{process}/fd").iterdir():
                with suppress(FileNotFoundError):
                    inodes.add(os.readlink(place))
    found = {}
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split(None, 10)[:10]
            if state == LISTEN and f"socket:[{inode}]" in inodes:
                address, _, port = local.partition(":")
                words = struct.unpack(f">{len(address) // 8}I", bytes.fromhex(address))
                packed = struct.pack(f"={len(words)}I", *words)
                found[int(port, 16)] = socket.inet_ntop(family, packed)
    return found


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback
