"""How fast a device computes and copies, for plans and estimates of time."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from magihuman.runtime.memory.plan import COPY_BYTES_PER_S

PROBE_BYTES, PROBES = 2**26, 3  # copied to measure the bus, and how often


@dataclass(frozen=True)
class Speeds:
    """Of a device. Without figures of its own, those of an H100.

    Attributes:
        copy_bytes_per_s: from pinned host memory to the device.
        linear_flops: operations a second of the transformer's products; None for the precision's.
        attention_flops: the same, of attention.
    """

    copy_bytes_per_s: float = COPY_BYTES_PER_S
    linear_flops: float | None = None
    attention_flops: float = 5.5e14  # of an H100; plain PyTorch reaches about half


H100 = Speeds()


def speeds_of(device: torch.device) -> Speeds:
    """Speeds of a device, its bus measured once in a process; those of an H100 where none is."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return H100
    return Speeds(measured_bus(device))


@functools.lru_cache
def measured_bus(device: torch.device) -> float:
    """Bytes a second from pinned host memory to a GPU: the fastest of a few copies of 64 MiB."""
    host = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
    times = []
    for _ in range(PROBES + 1):  # the first one warms up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            start.record()
            there.copy_(host, non_blocking=True)
            end.record()
            end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return PROBE_BYTES / min(times[1:])
